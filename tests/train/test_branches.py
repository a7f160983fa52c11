"""Trunk and branches in the engine: bit for bit the separate run, from a trunk that is there, lost, spoilt or diverged."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling.branches import plan_branches
from scaling.errors import InputError
from scaling.records import RunRecord
from scaling.schedule import branch_step, learning_rates
from scaling.spec import RunSpec, ScheduleSpec
from scaling.sweepdir import KEPT, RunDir
from train.engine import Host, train

ROOT = Path(__file__).resolve().parents[2]
Specs = Callable[..., RunSpec]


@pytest.fixture
def family(make_spec: Specs) -> list[RunSpec]:
    """Three lengths of one run: the last is the trunk of the others."""
    return plan_branches([make_spec(steps=steps) for steps in (30, 45, 60)])


def train_in(folder: Path, spec: RunSpec, host: Host | None = None) -> RunRecord:
    return train(spec, RunDir(folder / spec.run_id), host)


def alone(spec: RunSpec) -> RunSpec:
    return dataclasses.replace(spec, parent_run_id=None, parent_step=None, keep_steps=())


def steps_of(run: RunDir) -> list[list[float]]:
    return [[row[k] for k in ("step", "tokens", "train_loss", "grad_norm", "lr")] for row in run.metrics()]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optim": "adamw"},
        {"schedule": ScheduleSpec("wsd", 5 * 256, decay_fraction=0.05, decay_shape="linear", final_lr_ratio=0.1)},
        {"schedule": ScheduleSpec("wsd", 20 * 256, decay_fraction=0.5)},
    ],
)
def test_a_branch_is_its_separate_twin_bit_for_bit(
    make_spec: Specs, tmp_path: Path, fields: dict[str, object]
) -> None:
    """Final and training losses, metrics, and the id; the trunk itself too."""
    branch, trunk = plan_branches([make_spec(steps=steps, **fields) for steps in (40, 60)])
    assert branch.parent_run_id == trunk.run_id
    for spec in (trunk, branch):
        joint, twin = train_in(tmp_path / "joint", spec), train_in(tmp_path / "alone", alone(spec))
        assert (joint.run_id, joint.loss, joint.train_loss) == (twin.run_id, twin.loss, twin.train_loss)
        runs = [RunDir(tmp_path / where / spec.run_id) for where in ("joint", "alone")]
        assert steps_of(runs[0]) == steps_of(runs[1])
        assert (joint.start_step, twin.start_step) == (spec.parent_step or 0, 0)
        assert joint.flops == twin.flops
        assert joint.bought_flops == spec.bought_flops <= twin.bought_flops == spec.flops


def test_the_trunk_keeps_the_branch_points_and_its_model(family: list[RunSpec], tmp_path: Path) -> None:
    *branches, trunk = family
    train_in(tmp_path, trunk, Host(checkpoint_every_s=0.01))
    names = sorted(path.name for path in (tmp_path / trunk.run_id / "checkpoints").iterdir())
    assert names == [f"step-{b.parent_step:09d}{KEPT}" for b in branches] + [f"step-{trunk.steps:09d}.pt"]


def test_a_branch_waits_for_its_trunk_alone(family: list[RunSpec], tmp_path: Path) -> None:
    branch, _, trunk = family
    runs = {spec.run_id: RunDir(tmp_path / spec.run_id) for spec in family}
    for spec in family:
        runs[spec.run_id].create(spec)
    assert runs[trunk.run_id].waits_for() is None
    assert runs[branch.run_id].waits_for() == trunk.run_id
    train_in(tmp_path, trunk)
    assert runs[branch.run_id].waits_for() is None


@pytest.mark.parametrize("lost", ["all", "newest", "spoilt"])
def test_a_lost_branch_point_costs_steps_and_nothing_else(
    family: list[RunSpec], tmp_path: Path, capfd: pytest.CaptureFixture[str], lost: str
) -> None:
    first, second, trunk = family
    train_in(tmp_path, trunk)
    points = sorted((tmp_path / trunk.run_id / "checkpoints").glob(f"*{KEPT}"))
    for point in points if lost == "all" else points[-1:]:
        if lost == "spoilt":
            point.write_bytes(point.read_bytes()[:-2000])
        else:
            point.unlink()
    record = train_in(tmp_path, second)
    assert record.start_step == (0 if lost == "all" else first.parent_step)
    assert record.loss == train_in(tmp_path / "alone", alone(second)).loss
    assert record.bought_flops > second.bought_flops
    errors = capfd.readouterr().err
    assert ("training it from its first step" in errors) == (lost == "all")
    assert ("cannot be read" in errors) == (lost == "spoilt")


@pytest.mark.parametrize("who", ["trunk", "branch"])
def test_killed_anywhere_the_family_ends_the_same(family: list[RunSpec], tmp_path: Path, who: str) -> None:
    branch, _, trunk = family
    twin = train_in(tmp_path / "alone", alone(branch))
    victim = trunk if who == "trunk" else branch
    if who == "branch":
        train_in(tmp_path, trunk)
    run = RunDir(tmp_path / victim.run_id)
    run.create(victim)
    process = subprocess.Popen(
        [sys.executable, "-m", "train.run", str(run.path), "--checkpoint-every", "0"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not list(run.checkpoints.glob("step-*.pt")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train_in(tmp_path, trunk)
    record = train_in(tmp_path, branch)
    assert (record.loss, record.start_step) == (twin.loss, branch.parent_step)
    assert [row["step"] for row in RunDir(tmp_path / branch.run_id).metrics()] == list(range(1, branch.steps + 1))
    assert record.attempts + RunDir(tmp_path / trunk.run_id).last_attempt() == 3


def test_branches_of_a_trunk_that_diverged_before_them_diverge_with_its_reason(
    make_spec: Specs, tmp_path: Path
) -> None:
    blows_up = {"peak_lr": 1.5, "optim": "adamw", "divergence_factor": 1.1, "schedule": ScheduleSpec("wsd", 2 * 256)}
    *branches, trunk = plan_branches([make_spec(steps=steps, **blows_up) for steps in (3, 60, 80)])
    ended = train_in(tmp_path, trunk)
    assert ended.status == "diverged"
    early, late = (train_in(tmp_path, branch) for branch in branches)
    step = ended.tokens // trunk.batch_tokens
    assert branches[0].parent_step < step <= branches[1].parent_step
    assert early.start_step == branches[0].parent_step  # the trunk was well until there
    assert (late.status, late.loss) == ("diverged", None)
    assert late.reason == f"its trunk {trunk.run_id} diverged: {ended.reason}"
    assert (late.tokens, late.bought_flops) == (ended.tokens, 0)


def test_another_runs_checkpoint_is_no_branch_point(make_spec: Specs, tmp_path: Path) -> None:
    branch, trunk = plan_branches([make_spec(steps=steps) for steps in (40, 60)])
    other = dataclasses.replace(trunk, seed=1)
    train_in(tmp_path, other)
    with pytest.raises(InputError, match="of a run that differs in more than tokens"):
        train_in(tmp_path, dataclasses.replace(branch, parent_run_id=other.run_id))
    longer = dataclasses.replace(branch, shape=dataclasses.replace(branch.shape, seq_len=64))
    train_in(tmp_path, trunk)
    with pytest.raises(InputError, match="of a run that differs in more than tokens"):
        train_in(tmp_path, longer)
    with pytest.raises(InputError, match="lies in a cool-down"):
        train_in(tmp_path, dataclasses.replace(branch, parent_step=35))


@pytest.mark.parametrize("decay_fraction", [0.0, 0.07, 0.2, 1 / 3, 0.5, 1.0])
def test_until_the_branch_point_learning_rates_are_the_longer_runs(make_spec: Specs, decay_fraction: float) -> None:
    schedule = ScheduleSpec("wsd", 5 * 256, decay_fraction)
    longer = learning_rates(make_spec(steps=400, schedule=schedule))
    for steps in (6, 7, 30, 61, 199, 200):
        spec = make_spec(steps=steps, schedule=schedule)
        point = branch_step(spec)
        own = learning_rates(spec)
        assert own[:point] == longer[:point]
        assert point == steps - 1 or own[point] < longer[point]
