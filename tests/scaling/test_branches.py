"""Trunk and branches of a sweep: the plan, its price, and a launch that trains each step once whatever is killed."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.runs import load_runs
from scaling.branches import plan_branches, with_digests
from scaling.errors import InputError
from scaling.grid import expand_grid
from scaling.records import Plan
from scaling.schedule import branch_step
from scaling.spec import RunSpec
from scaling.status import sweep_status
from scaling.sweepdir import SweepDir

ROOT = Path(__file__).resolve().parents[2]
SweepWith = Callable[..., tuple[int, SweepDir]]
FAMILY = ["model=demo", "flops=null", "sweep.branches=true"]


def families(specs: list[RunSpec]) -> dict[str, list[RunSpec]]:
    """Branches by their trunk's id."""
    out: dict[str, list[RunSpec]] = {spec.run_id: [] for spec in specs if spec.parent_run_id is None}
    for spec in specs:
        if spec.parent_run_id is not None:
            out[spec.parent_run_id].append(spec)
    return out


# --- the plan and its price


def test_of_runs_that_differ_in_length_alone_the_longest_is_the_trunk() -> None:
    specs = expand_grid(["+grid=branches", "seed=0,1"]).specs
    by_id = {spec.run_id: spec for spec in specs}
    trunks = families(specs)
    assert len(trunks) == len({(spec.shape.width, spec.seed) for spec in specs}) == 10
    for run_id, branches in trunks.items():
        trunk = by_id[run_id]
        assert len(branches) == 3
        assert trunk.keep_steps == tuple(sorted(branch_step(branch) for branch in branches))
        for branch in branches:
            assert branch.tokens < trunk.tokens
            assert branch.parent_step == branch_step(branch) in trunk.keep_steps
            same = ("shape", "optim", "schedule", "batch_tokens", "seed")
            assert all(getattr(branch, name) == getattr(trunk, name) for name in same)


def test_branches_have_the_ids_of_separate_runs() -> None:
    by_hand = ["model=demo", "tokens=64000,128000", "optim.peak_lr=0.01", "batch_tokens=512", "seed=0,1"]
    by_hand += ["schedule.warmup_tokens=5120"]
    separate = expand_grid(by_hand).specs
    joined = expand_grid([*by_hand, "sweep.branches=true"]).specs
    assert [spec.run_id for spec in joined] == [spec.run_id for spec in separate]
    assert {spec.parent_run_id for spec in separate} == {None}
    assert sum(spec.parent_run_id is not None for spec in joined) == 2


def test_a_length_added_later_leaves_the_other_runs_as_they_are() -> None:
    lengths = ["tokens_per_param=5,10,20", "tokens_per_param=5,10,20,80"]
    few, more = ({s.run_id for s in expand_grid([*FAMILY, length]).specs} for length in lengths)
    assert few < more


@pytest.mark.parametrize(("lengths", "least"), [("1e6,2e6,3e6,4e6", 1.85), ("1e6,2e6,4e6,8e6", 1.55)])
def test_flops_bought_are_the_trunk_once_and_the_cool_downs(lengths: str, least: float) -> None:
    """Σ D over max D + decay_fraction · Σ of the others."""
    specs = expand_grid([*FAMILY, f"tokens={lengths}"]).specs
    tokens = [float(text) for text in lengths.split(",")]
    ratio = math.fsum(s.flops for s in specs) / math.fsum(s.bought_flops for s in specs)
    assert ratio == pytest.approx(sum(tokens) / (max(tokens) + 0.2 * (sum(tokens) - max(tokens))), rel=2e-3)
    assert ratio >= least


def test_a_length_alone_has_no_trunk_and_the_recipe_of_those_to_come() -> None:
    (alone,) = expand_grid([*FAMILY, "tokens_per_param=5"]).specs
    assert (alone.parent_run_id, alone.keep_steps) == (None, ())
    assert alone.run_id in {spec.run_id for spec in expand_grid([*FAMILY, "tokens_per_param=5,10"]).specs}
    anchored = expand_grid(["model=demo", "tokens_per_param=20"]).specs[0]
    assert (alone.optim.peak_lr, alone.batch_tokens) == (anchored.optim.peak_lr, anchored.batch_tokens)


def test_lengths_that_one_recipe_does_not_serve_are_noted() -> None:
    def notes(lengths: str) -> str:
        return " ".join(expand_grid([*FAMILY, "model.width=16", f"tokens_per_param={lengths}"]).notes)

    assert "lengths from 0.25 to 2 times the 20 tokens per parameter of their trunks' recipe" in notes("5,10,20,40")
    assert "their trunks' recipe" not in notes("15,20,40")


def test_the_prepared_corpus_renames_trunks_with_their_runs() -> None:
    specs = with_digests(expand_grid(["+grid=branches"]).specs, {1024: "0123456789abcdef"})
    assert {s.parent_run_id for s in specs} - {None} <= {s.run_id for s in specs}
    assert plan_branches(specs) == specs


@pytest.mark.parametrize("name", ["demo", "lr", "lr_check"])
def test_run_ids_of_committed_sweeps_stand(name: str) -> None:
    """Ids hash what decides a result: those of runs without branches are what they were when they were trained."""
    folder = ROOT / "sweeps" / name
    with open(folder / "runs.csv", newline="") as file:
        trained = {row["run_id"] for row in csv.DictReader(file)}
    assert trained
    plan = Plan.read(folder / "plan.json")
    assert trained <= {spec.run_id for spec in plan.runs}
    written = json.loads((folder / "plan.json").read_text())["runs"]
    assert [spec.to_dict() for spec in plan.runs] == written  # as they were hashed into the seals of forecasts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["schedule=cosine", "tokens=1e6,2e6"], "schedule=cosine: cool-downs branch off a constant learning rate"),
        (["sweep.trunk_tokens_per_param=0", "tokens=1e6"], "sweep.trunk_tokens_per_param = 0.0: must be positive"),
        (["tokens=3e3"], "trunk's warm-up, whose recipe is asked at 20 tokens per parameter: lower"),
        (["sweep.branches=3", "tokens=1e6"], "sweep.branches: expected bool, got 3"),
    ],
)
def test_bad_settings(settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        expand_grid([*FAMILY, *settings])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parent_run_id": "ab"}, "a branch has both"),
        ({"parent_run_id": "ab", "parent_step": 10**6}, "branch point 1000000: must be within the run"),
        ({"keep_steps": [0]}, "branch point 0: must be within the run"),
    ],
)
def test_specs_that_cannot_be(fields: dict[str, object], message: str) -> None:
    (spec,) = expand_grid([*FAMILY, "tokens=1e6"]).specs
    with pytest.raises(InputError, match=message):
        RunSpec.from_dict({**spec.to_dict(), **fields})


def test_dry_run_prices_the_trunk_once(cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = cli("scaling.sweep", "+grid=branches", "dry_run=true")
    assert done.returncode == 0, done.stderr
    bought, separately, ratio = re.search(
        r"20 runs, (\S+) FLOPs \((\S+) without trunks: ×(\S+)\)", done.stdout
    ).groups()
    assert (
        float(ratio)
        == pytest.approx(100 / 52, abs=0.01)
        == pytest.approx(float(separately) / float(bought), abs=0.01)
    )


# --- the launch


def test_a_trunk_that_fails_fails_its_branches_and_the_next_launch_tries_again(
    sweep_with: SweepWith, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = ("tokens=1280,2560,5120", "sweep.branches=true", "schedule.warmup_tokens=128")
    status, sweep = sweep_with({1: "raise"}, *lengths)
    assert status == 1
    trunk = next(s for s in sweep.plan().runs if s.seed == 1 and s.keep_steps)
    found = sweep_status(sweep)
    assert (found["done"], found["failed"]) == (6, 3)
    for run in found["runs"]:
        if run["state"] == "failed" and run["run_id"] != trunk.run_id:
            assert run["reason"] == f"its trunk {trunk.run_id} failed: ValueError: as it was told"
            assert not (sweep.run(run["run_id"]).path / "tries.txt").exists()
    assert f"its trunk {trunk.run_id} failed" in capsys.readouterr().err
    assert sweep_with({}, *lengths)[0] == 0
    assert sweep_status(sweep)["done"] == 9


SETTINGS = [
    "model=smoke", "model.vocab_size=300", "data=text", f"data.path='{Path(asyncio.__file__).parent}/*.py'",
    "tokens=5120,10240,20480", "seed=0,1", "batch_tokens=256", "optim.peak_lr=0.02", "schedule.warmup_tokens=1280",
    "eval.tokens=4096", "eval.points=2", "launcher.workers=2", "launcher.checkpoint_every_s=0.1",
]  # fmt: skip


def start(cache: Path, sweep: SweepDir, *extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "scaling.sweep", *SETTINGS, *extra, f"sweep.dir={sweep.path}"],
        cwd=ROOT,
        env={**os.environ, "ISOFLOP_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(launcher: subprocess.Popen[str]) -> str:
    out, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 0, out + errors
    return errors


def wait_for_file(launcher: subprocess.Popen[str], sweep: SweepDir, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not list(sweep.runs.glob(pattern)):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_workers(sweep: SweepDir) -> int:
    """Kill -9 whatever holds a run now; how many there were."""
    held = [run for run in (sweep.run(spec.run_id) for spec in sweep.plan().runs) if run.is_leased()]
    leases = [json.loads((run.attempt_dir(run.last_attempt()) / "lease.json").read_text()) for run in held]
    for pid in {lease["pid"] for lease in leases}:
        os.kill(pid, signal.SIGKILL)
    return len(held)


def test_killed_in_the_trunk_and_in_a_branch_the_same_command_finishes_each_run_once(
    cache: Path, tmp_path: Path
) -> None:
    """Losses to the bit those of separate runs; then nothing is left to do."""
    apart, sweep = SweepDir(tmp_path / "apart"), SweepDir(tmp_path / "sweep")
    finish(start(cache, apart))
    losses = {record.run_id: record.loss for record in apart.records()}
    assert len(set(losses.values())) == 6

    launcher = start(cache, sweep, "sweep.branches=true")
    wait_for_file(launcher, sweep, "*/checkpoints/step-*.pt")
    assert kill_workers(sweep) >= 1  # in a trunk
    branch = next(spec for spec in sweep.plan().runs if spec.parent_run_id)
    wait_for_file(launcher, sweep, f"{branch.run_id}/attempts/0001/lease.json")
    launcher.kill()
    launcher.communicate()
    kill_workers(sweep)
    finish(start(cache, sweep, "sweep.branches=true"))

    plan = sweep.plan().runs
    assert {record.run_id: record.loss for record in sweep.records()} == losses
    assert all(record.start_step == (record.spec.parent_step or 0) for record in sweep.records())
    for spec in plan:
        assert [row["step"] for row in sweep.run(spec.run_id).metrics()] == list(range(1, spec.steps + 1))
    with open(sweep.runs_csv, newline="") as file:
        trunks = {row["run_id"]: row["trunk_id"] for row in csv.DictReader(file)}
    assert trunks == {spec.run_id: spec.parent_run_id or spec.run_id for spec in plan}
    table = load_runs(sweep.path).table
    assert dict(zip(table["run_id"], table["trunk"], strict=True)) == trunks

    status = sweep_status(sweep)
    assert status["flops_bought"] == pytest.approx(math.fsum(spec.bought_flops for spec in plan))
    assert sweep_status(apart)["flops_bought"] == pytest.approx(math.fsum(spec.flops for spec in plan))

    attempts = {spec.run_id: sweep.run(spec.run_id).last_attempt() for spec in plan}
    assert "6 of 6 runs are done already" in finish(start(cache, sweep, "sweep.branches=true"))
    assert attempts == {spec.run_id: sweep.run(spec.run_id).last_attempt() for spec in plan}
