"""On a real SLURM: runs that fail, each in its way, and sweeps that are refused before anything is submitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scaling.sweepdir import SweepDir

sys.path.insert(0, str(Path(__file__).parent))
from private_slurm import PrivateSlurm
from slurm_sweeps import (
    Sweeps,
    arrays,
    assert_as_undisturbed,
    end,
    finish,
    wait_until,
)

GRID = ["model.width=16", "seed=0,1"]
SLOW = {"all": "slow"}
Losses = dict[str, float | None]


def test_segfaults(sweeps: Sweeps, sweep: SweepDir, losses: Losses) -> None:
    """Once: tried again in the same job. Each time: given up, the other runs done; the next launch tries again."""
    status, _, error = end(sweeps.start(sweep, *GRID, behaviour={"0": "segfault", "1": "segfaults"}))
    assert status == 1
    assert "died 3 times: killed by SIGSEGV" in error
    states = {spec.seed: sweep.run(spec.run_id).state() for spec in sweep.plan().runs}
    assert states == {0: "done", 1: "failed"}
    finish(sweeps.start(sweep, *GRID))
    assert_as_undisturbed(sweep, losses)


def test_out_of_memory_halves_the_micro_batch(sweeps: Sweeps, sweep: SweepDir, tmp_path: Path) -> None:
    large = ["tokens=131072", "batch_tokens=65536", "launcher.micro_batch_tokens=65536", "launcher.mem=2G"]
    finish(sweeps.start(sweep, *large, behaviour={"0": "memory"}))
    (record,) = sweep.records()
    run = sweep.run(record.run_id)
    failure = json.loads((run.attempt_dir(1) / "failure.json").read_text())
    assert failure["out_of_memory_at"] == 65536
    sizes = [
        json.loads(path.read_text())["micro_batch_tokens"] for path in sorted(run.attempts.glob("*/provenance.json"))
    ]
    assert sizes == [65536 >> n for n in range(record.attempts)]
    whole = SweepDir(tmp_path / "whole")
    finish(sweeps.start(whole, *large[:2], local=True))
    (twin,) = whole.records()
    assert twin.run_id == record.run_id
    assert record.loss == pytest.approx(twin.loss, rel=1e-5)


def test_a_held_job_is_reported_and_not_waited_for(sweeps: Sweeps, sweep: SweepDir) -> None:
    status, _, error = end(sweeps.start(sweep, "tokens=2560", "launcher.sbatch={hold: true}"))
    assert status == 1
    assert "is held (JobHeldUser)" in error


def test_nan_is_final(sweeps: Sweeps, sweep: SweepDir) -> None:
    wild = ["tokens=5120", "optim.peak_lr=1e12"]
    finish(sweeps.start(sweep, *wild))
    (record,) = sweep.records()
    assert record.status == "diverged"
    finish(sweeps.start(sweep, *wild))
    assert sweep.run(record.run_id).last_attempt() == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("launcher.partition=mian", "unknown launcher.partition 'mian': did you mean 'main'? valid: low, main"),
        ("launcher.gpus_per_node=3", "launcher.gpus_per_node = 3: a node of partition main has 2"),
        ("launcher.cpus_per_task=64", "launcher.cpus_per_task = 64: a node of partition main has 4"),
        ("launcher.time=100000", "partition main allows 600 min"),
        ("launcher.mem=900G", "sbatch refuses such a job"),
        ("launcher.constraint=h100", "sbatch refuses such a job"),
        ("launcher.checkpoint_every_s=400", "launcher.time = 5 min is shorter than one checkpoint interval"),
        ("launcher.tiem=3", "did you mean launcher.time"),
    ],
)
def test_jobs_that_cannot_be(setting: str, message: str, sweeps: Sweeps, sweep: SweepDir) -> None:
    status, out, error = sweeps.run(sweep, setting)
    assert (status, error.count("\n")) == (2, 1), out + error
    assert message in error
    assert not sweep.path.exists()


def test_no_slurm_here(sweeps: Sweeps, sweep: SweepDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sweeps.cluster.environment, "PATH", "/nowhere")
    status, _, error = sweeps.run(sweep)
    assert status == 2
    assert "not found here: sbatch" in error
    assert not sweep.path.exists()


def test_a_controller_that_does_not_answer(sweeps: Sweeps, sweep: SweepDir, tmp_path: Path) -> None:
    lost = tmp_path / "slurm.conf"
    text = (sweeps.cluster.dir / "slurm.conf").read_text().splitlines()
    lost.write_text(
        "\n".join("SlurmctldPort=1" if "SlurmctldPort" in line else line for line in [*text, "MessageTimeout=2"])
    )
    before = sweeps.cluster.environment["SLURM_CONF"]
    try:
        sweeps.cluster.environment["SLURM_CONF"] = str(lost)
        status, _, error = sweeps.run(sweep)
    finally:
        sweeps.cluster.environment["SLURM_CONF"] = before
    assert status == 2
    assert "SLURM's controller does not answer" in error


def test_another_commits_plan_an_edited_spec_and_a_read_only_folder(
    sweeps: Sweeps, sweep: SweepDir, cluster: PrivateSlurm
) -> None:
    tiny = ["tokens=2560"]
    finish(sweeps.start(sweep, *tiny))
    wait_until(lambda: not cluster.jobs("PENDING", "RUNNING"), "the job of a finished sweep is still there")
    plan = json.loads(sweep.plan_json.read_text())
    sweep.plan_json.write_text(json.dumps({**plan, "commit": "0" * 40}))
    status, _, error = sweeps.run(sweep, *tiny, "seed=1", "sweep.any_commit=false")
    assert status == 2
    assert f"was planned with code {'0' * 40}" in error
    assert "sweep.any_commit=true" in error

    run = sweep.run(sweep.plan().runs[0].run_id)
    spec = json.loads(run.spec_json.read_text())
    run.spec_json.write_text(json.dumps({**spec, "seed": 7}))
    status, _, error = sweeps.run(sweep, *tiny)
    assert status == 2
    assert "was edited" in error

    status, _, error = sweeps.run(SweepDir(Path("/proc/sweep")), *tiny)
    assert status == 2
    assert "cannot write in /proc/sweep" in error
    assert not cluster.jobs("PENDING", "RUNNING")
    assert len(arrays(sweep)) == 1


def test_a_full_disk_submits_nothing(sweeps: Sweeps, sweep: SweepDir, cluster: PrivateSlurm) -> None:
    """A tmpfs of 300 KB stands for the disk: some specs fit, not all."""
    sweep.path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(sweep.path)]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        status, _, error = sweeps.run(sweep, "tokens=2560", "seed=range(0,100)")
        assert (status, error.count("\n")) == (2, 1), error
        assert "No space left on device" in error
        assert not cluster.jobs()
    finally:
        subprocess.run(["umount", str(sweep.path)], check=True)
    assert os.listdir(sweep.path) == []
