"""Sweeps on a real SLURM, disturbed in every way: each run done once, with the loss that it has undisturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaling.status import sweep_status
from scaling.sweepdir import SweepDir

sys.path.insert(0, str(Path(__file__).parent))
from private_slurm import PrivateSlurm
from slurm_sweeps import (
    Sweeps,
    assert_as_undisturbed,
    end,
    job_of,
    trained_steps,
    wait_for_mid_run,
    wait_until,
)

GRID = ["model.width=16", "seed=0,1"]
SLOW = {"all": "slow"}
Losses = dict[str, float | None]


def arrays(sweep: SweepDir) -> list[Path]:
    return [path.parent for path in sweep.jobs.glob("*/array.json")]


def finish(launcher: subprocess.Popen[str]) -> str:
    """Wait for a launcher that must end well; what it said."""
    status, out, error = end(launcher)
    assert status == 0, f"{out}\n{error}"
    return out + error


def test_24_runs_on_an_array(sweeps: Sweeps, sweep: SweepDir) -> None:
    small = ["model.width=16", "tokens=2560", f"seed={','.join(map(str, range(24)))}", "launcher.array_parallelism=3"]
    finish(sweeps.start(sweep, *small))
    records = sweep.records()
    assert len(records) == 24
    assert {record.attempts for record in records} == {1}
    (array,) = arrays(sweep)
    tasks = json.loads((array / "array.json").read_text())["tasks"]
    assert len(tasks) > 2  # several jobs, several runs in each
    assert max(map(len, tasks)) > 2
    provenance = json.loads((sweep.run(tasks[1][0]).attempt_dir(1) / "provenance.json").read_text())
    assert provenance["slurm"]["job"].endswith("_1")
    assert provenance["slurm"]["node"] in ("n1", "n2")
    assert {"commit", "versions", "device", "host"} <= set(provenance)

    assert "24 of 24 runs are done already" in finish(sweeps.start(sweep, *small))
    assert arrays(sweep) == [array]  # nothing was submitted again
    finish(sweeps.start(sweep, *small[:2], "seed=23,24,25"))
    assert len(sweep.records()) == 26


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR2", "requeue", "partition"])
def test_preemption(how: str, sweeps: Sweeps, sweep: SweepDir, cluster: PrivateSlurm, losses: Losses) -> None:
    """SIGUSR2 is what comes shortly before the time limit, too."""
    launcher = sweeps.start(sweep, *GRID, "launcher.partition=low", "launcher.job_minutes=1", behaviour=SLOW)
    run = wait_for_mid_run(sweep, launcher)
    job = job_of(run)
    if how == "requeue":
        cluster.command("scontrol", "requeue", job)
    elif how == "partition":
        command = [
            "sbatch",
            "-p",
            "main",
            "-N",
            "2",
            "--exclusive",
            "--mem=100",
            "-o",
            "/dev/null",
            "--wrap",
            "sleep 3",
        ]
        assert cluster.command(*command)
    else:
        cluster.command("scancel", f"--signal={how}", job)
    finish(launcher)
    assert_as_undisturbed(sweep, losses)
    assert len(arrays(sweep)) == 1  # SLURM started the same job again
    assert (arrays(sweep)[0] / "0000" / "0002").exists()
    if how != "requeue":  # there was time for a checkpoint
        assert sum(trained_steps(sweep)) == 2 * 120


@pytest.mark.slow
def test_time_limit(sweeps: Sweeps, sweep: SweepDir, losses: Losses) -> None:
    """A job of one minute with half a minute of runs; SLURM looks at limits twice a minute, so the signal comes early."""
    limits = [
        "launcher.time=1",
        "launcher.signal_delay_s=20",
        "launcher.job_minutes=9",
        "launcher.checkpoint_every_s=9",
    ]
    finish(sweeps.start(sweep, *GRID, *limits, behaviour={"all": "slower"}))
    assert_as_undisturbed(sweep, losses)
    assert len(arrays(sweep)) == 1
    assert (arrays(sweep)[0] / "0000" / "0002").exists()
    assert sum(trained_steps(sweep)) == 2 * 120


def test_a_dead_slurmd_whose_step_lives_on(
    sweeps: Sweeps, sweep: SweepDir, cluster: PrivateSlurm, losses: Losses
) -> None:
    """SLURM starts the job again elsewhere; the copy that nobody can reach any more stops by itself."""
    launcher = sweeps.start(sweep, *GRID, "launcher.job_minutes=1", behaviour={"all": "slower"})
    run = wait_for_mid_run(sweep, launcher)
    worker = run.holder()
    node = json.loads((run.attempt_dir(1) / "provenance.json").read_text())["slurm"]["node"]
    cluster.kill(node)
    cluster.command("scontrol", "update", f"nodename={node}", "state=down", "reason=test")  # sooner than its timeout
    assert worker is not None
    assert Path(f"/proc/{worker}").exists()
    (array,) = arrays(sweep)
    wait_until((array / "0000" / "0002").exists, "SLURM did not start the job again")
    wait_until(lambda: not _runs(worker), "the old copy did not stop")
    cluster.start(node)
    cluster.command("scontrol", "update", f"nodename={node}", "state=resume")
    finish(launcher)
    assert_as_undisturbed(sweep, losses)
    assert run.last_attempt() == 2
    (log,) = array.glob("submitit/*_log.out")
    assert "start 1 of this job was superseded" in log.read_text()


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_a_dead_controller(sweeps: Sweeps, sweep: SweepDir, cluster: PrivateSlurm, losses: Losses) -> None:
    launcher = sweeps.start(sweep, *GRID, behaviour=SLOW)
    wait_for_mid_run(sweep, launcher)
    cluster.kill("slurmctld")
    time.sleep(3)
    cluster.start("slurmctld")
    finish(launcher)
    assert_as_undisturbed(sweep, losses)
    assert len(arrays(sweep)) == 1
    assert sum(trained_steps(sweep)) == 2 * 120


def test_a_killed_launchers_jobs_are_followed_by_the_next(sweeps: Sweeps, sweep: SweepDir, losses: Losses) -> None:
    launcher = sweeps.start(sweep, *GRID, behaviour=SLOW)
    wait_for_mid_run(sweep, launcher)
    launcher.kill()
    launcher.communicate()
    finish(sweeps.start(sweep, *GRID, behaviour=SLOW))
    assert_as_undisturbed(sweep, losses)
    assert len(arrays(sweep)) == 1
    assert sum(trained_steps(sweep)) == 2 * 120


def test_two_launchers_submit_once(sweeps: Sweeps, sweep: SweepDir, losses: Losses) -> None:
    for launcher in [sweeps.start(sweep, *GRID), sweeps.start(sweep, *GRID)]:
        finish(launcher)
    assert_as_undisturbed(sweep, losses)
    assert len(arrays(sweep)) == 1


def test_detached(sweeps: Sweeps, sweep: SweepDir, losses: Losses) -> None:
    assert "jobs submitted" in finish(sweeps.start(sweep, *GRID, "sweep.wait=false", behaviour=SLOW))
    assert not sweep.records()
    assert "0 jobs submitted" in finish(sweeps.start(sweep, *GRID, "sweep.wait=false"))  # they are on their way
    wait_until(lambda: sweep_status(sweep)["done"] == 2)
    assert_as_undisturbed(sweep, losses)


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


def test_job_ids_that_restart(sweeps: Sweeps, sweep: SweepDir, cluster: PrivateSlurm, losses: Losses) -> None:
    """A new controller without memory counts from 1 again: results of the old ids are not taken for the new jobs'."""
    finish(sweeps.start(sweep, "model.width=16", "seed=0"))
    cluster.kill("slurmctld", signal.SIGTERM)
    shutil.rmtree(cluster.dir / "state")
    (cluster.dir / "state").mkdir()
    cluster.start("slurmctld")
    cluster.wait_idle()
    finish(sweeps.start(sweep, *GRID))
    assert_as_undisturbed(sweep, losses)


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
