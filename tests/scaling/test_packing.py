"""Runs to jobs; the start of a job that fences the one before; a heartbeat; the watch."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling import status, sweepdir
from scaling.slurm.array import JobDir
from scaling.slurm.packing import pack
from scaling.sweepdir import JOB_VARIABLE, RunDir, SweepDir


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=60), st.floats(1.0, 1e3), st.integers(1, 8))
def test_every_run_is_in_one_job_and_no_job_is_far_above_the_mean(
    times: list[float], job_s: float, workers: int
) -> None:
    seconds = {f"run-{number}": time_s for number, time_s in enumerate(times)}
    jobs = pack(seconds, job_s, workers)
    assert sorted(run for job in jobs for run in job) == sorted(seconds)
    assert all(jobs)
    work = [sum(seconds[run] for run in job) for job in jobs]
    assert work == sorted(work, reverse=True)
    assert all(seconds[job[0]] == max(seconds[run] for run in job) for job in jobs)
    assert max(work) <= max(max(times), sum(times) / len(jobs) + max(times))  # the bound of list scheduling
    assert len(jobs) >= min(len(times), sum(min(t, job_s) for t in times) / (job_s * workers) - 1e-6)


def test_a_long_run_has_a_job_of_its_own_and_small_ones_share() -> None:
    assert pack({"long": 900, **{f"small-{n}": 10.0 for n in range(30)}}, job_s=100, workers=1)[0] == ["long"]
    assert len(pack({f"small-{n}": 10.0 for n in range(30)}, job_s=100, workers=1)) == 3
    assert len(pack({f"small-{n}": 10.0 for n in range(30)}, job_s=100, workers=3)) == 1


def test_a_second_start_of_a_job_takes_over_the_first_ones_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, other = JobDir(tmp_path / "jobs" / "abcd", 3), JobDir(tmp_path / "jobs" / "abcd", 4)
    first, second = job.start(), job.start()
    assert (first, second, job.last_start()) == (1, 2, 2)
    run = RunDir(tmp_path / "runs" / "0123")
    monkeypatch.setenv(JOB_VARIABLE, job.key(first))
    old = run.acquire()
    assert old is not None
    monkeypatch.setenv(JOB_VARIABLE, other.key(other.start()))
    assert run.acquire() is None  # another job's: its process lives
    monkeypatch.setenv(JOB_VARIABLE, job.key(second))
    new = run.acquire()
    assert new is not None
    assert new.attempt == 2
    with pytest.raises(sweepdir.LostLease):
        old.check()
    new.check()
    monkeypatch.setenv(JOB_VARIABLE, job.key(first))
    assert run.acquire() is None  # the older start does not take it back
    old.release()
    new.release()


def test_the_heartbeat_goes_on_while_a_step_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweepdir, "HEARTBEAT_S", 0.05)
    lease = RunDir(tmp_path / "0123").acquire()
    assert lease is not None
    file = lease.folder / "lease.json"
    os.utime(file, (0, 0))
    deadline = time.monotonic() + 10
    while file.stat().st_mtime < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert file.stat().st_mtime > 1
    lease.release()


def test_a_lease_of_another_host_is_dead_without_a_heartbeat(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "0123")
    lease = run.acquire()
    assert lease is not None
    file = lease.folder / "lease.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "process_space": "elsewhere"}))
    assert run.is_leased()
    old = time.time() - 2 * sweepdir.LEASE_TIMEOUT_S
    os.utime(file, (old, old))
    assert not run.is_leased()
    lease.release()


def test_watch_ends_when_nothing_runs_or_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo = Path(__file__).resolve().parents[2] / "sweeps" / "demo"
    if not demo.exists():
        pytest.skip("the demo's sweep is not in this checkout")
    status.watch(SweepDir(demo), 0.1)
    assert " done" in capsys.readouterr().out.splitlines()[-1]
