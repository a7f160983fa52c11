"""A real sweep of real runs, killed in every way: nothing is lost, nothing is trained twice, and no bit of a loss changes."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scaling.files import read_json_lines
from scaling.sweepdir import RunDir, SweepDir

ROOT = Path(__file__).resolve().parents[1]
TEXT = Path(sysconfig.get_paths()["stdlib"]) / "[a-b]*.py"
SETTINGS = [
    "model=smoke", "model.vocab_size=300", "model.width=16,24", "data=text", f"data.path='{TEXT}'", "tokens=30720",
    "batch_tokens=256", "eval.tokens=4096", "eval.points=2", "launcher.workers=2", "launcher.checkpoint_every_s=0.1",
    "sweep.any_commit=true",  # whoever works in the clone meanwhile
]  # fmt: skip
SEEDS = "seed=0,1,2"
N_RUNS, STEPS = 6, 120
PATIENCE_S = 600.0
"""For what takes a few seconds on a quiet machine."""

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def launch(cache: Path) -> Iterator[Launch]:
    """Start `python -m scaling.sweep` on a folder; whatever is left of it ends with the test."""
    sweeps = []

    def start(sweep: SweepDir, seeds: str = SEEDS) -> subprocess.Popen[str]:
        sweeps.append(sweep)
        return _start(cache, sweep, seeds)

    yield start
    for sweep in sweeps:
        for pid in processes(sweep):
            kill(pid)


def _start(cache: Path, sweep: SweepDir, seeds: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "scaling.sweep", *SETTINGS, seeds, f"sweep.dir={sweep.path}"],
        cwd=ROOT,
        env={**os.environ, "ISOFLOP_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(launcher: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait for a launcher that must end well; what it said."""
    out, error = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 0, f"{out}\n{error}"
    return out, error


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepDir:
    """The sweep as it is when nothing happens to it."""
    sweep = SweepDir(tmp_path_factory.mktemp("undisturbed") / "sweep")
    finish(_start(cache, sweep, SEEDS))
    return sweep


@pytest.fixture(scope="module")
def losses(undisturbed: SweepDir) -> dict[str, float | None]:
    """Final losses of the undisturbed sweep by run id."""
    found = {record.run_id: record.loss for record in undisturbed.records()}
    assert len(found) == len(set(found.values())) == N_RUNS
    return found


@pytest.fixture
def sweep(losses: dict[str, float | None], tmp_path: Path) -> SweepDir:
    """A folder for the disturbed sweep."""
    return SweepDir(tmp_path / "sweep")


def processes(sweep: SweepDir, module: str = "") -> list[int]:
    """The live processes, workers or launchers, whose command line names this sweep."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if any(str(sweep.path) in word for word in words) and (not module or module in words):
            found.append(int(path.parent.name))
    return found


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    wait_until(lambda: not is_alive(pid))


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and is not yet collected does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def wait_until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_mid_run(sweep: SweepDir, launcher: subprocess.Popen[str]) -> RunDir:
    """A run that is being trained and has a checkpoint."""
    seen: list[RunDir] = []

    def look() -> bool:
        assert launcher.poll() is None, launcher.communicate()
        runs = [RunDir(path.parent.parent) for path in sweep.runs.glob("*/checkpoints/step-*.pt")]
        seen.extend(run for run in runs if run.is_leased() and not run.record_json.exists())
        return bool(seen)

    wait_until(look)
    return seen[0]


def records(sweep: SweepDir) -> dict[str, tuple[int, int]]:
    """The finished runs' records: which file, and of when."""
    stats = {path.parent.name: path.stat() for path in sweep.runs.glob("*/record.json")}
    return {run_id: (stat.st_ino, stat.st_mtime_ns) for run_id, stat in stats.items()}


def assert_as_undisturbed(
    sweep: SweepDir, losses: dict[str, float | None], before: dict[str, tuple[int, int]] | None = None
) -> None:
    """Every run once, to the same bit; none trained after its record; the records that were there `before` untouched."""
    assert {record.run_id: record.loss for record in sweep.records()} == losses
    assert {path.name for path in sweep.runs.iterdir() if path.is_dir()} == set(losses)
    now = records(sweep)
    assert before is None or {run_id: now[run_id] for run_id in before} == before
    for record in sweep.records():
        run = sweep.run(record.run_id)
        later = range(record.attempts + 1, run.last_attempt() + 1)
        assert not [n for n in later if (run.attempt_dir(n) / "metrics.jsonl").exists()]
        assert [row["step"] for row in run.metrics()] == list(range(1, STEPS + 1))
    with open(sweep.runs_csv, newline="") as file:
        rows = [(row["run_id"], float(row["loss"])) for row in csv.DictReader(file)]
    assert len(rows) == N_RUNS
    assert dict(rows) == losses


def first_steps(run: RunDir) -> list[int]:
    """The step at which each attempt that trained began."""
    attempts = (run.attempt_dir(n) / "metrics.jsonl" for n in range(1, run.last_attempt() + 1))
    return [rows[0]["step"] for path in attempts if path.exists() and (rows := read_json_lines(path))]


def test_a_killed_workers_run_goes_on_from_its_checkpoint(
    sweep: SweepDir, losses: dict[str, float | None], launch: Launch
) -> None:
    launcher = launch(sweep)
    run = wait_for_mid_run(sweep, launcher)
    worker = run.holder()
    assert worker in processes(sweep, "train.run")
    kill(worker)
    done = records(sweep)
    finish(launcher)  # the same launch replaces the worker
    assert_as_undisturbed(sweep, losses, done)
    first, second = first_steps(run)
    assert first == 1 < second
    done = records(sweep)
    finish(launch(sweep))
    assert_as_undisturbed(sweep, losses, done)


def test_a_killed_launchers_orphans_and_the_next_launch_train_each_run_once(
    sweep: SweepDir, losses: dict[str, float | None], launch: Launch
) -> None:
    launcher = launch(sweep)
    wait_for_mid_run(sweep, launcher)
    kill(launcher.pid)
    launcher.communicate()
    orphans = processes(sweep, "train.run")
    again = launch(sweep)
    assert orphans
    finish(again)
    assert_as_undisturbed(sweep, losses)
    assert all(record.attempts == 1 for record in sweep.records())  # the orphans finished what they had
    wait_until(lambda: not processes(sweep))


@pytest.mark.slow
def test_everything_killed_three_times_at_random_moments(
    sweep: SweepDir, losses: dict[str, float | None], launch: Launch
) -> None:
    moments = random.Random()
    for _ in range(3):
        launcher = launch(sweep)
        training = len(records(sweep)) < N_RUNS and moments.random() < 0.7  # else: while it starts
        if training:
            wait_for_mid_run(sweep, launcher)
        pause_s = moments.uniform(0, 3)
        time.sleep(pause_s)
        victims = processes(sweep)
        moments.shuffle(victims)
        print(f"{training=}, {pause_s:.2f} s later: {len(victims)} killed, {len(records(sweep))} runs done")
        for pid in victims:
            kill(pid)
        launcher.communicate()
        while late := processes(sweep):  # a worker that was being started
            for pid in late:
                kill(pid)
        done = records(sweep)
    finish(launch(sweep))
    assert_as_undisturbed(sweep, losses, done)


def test_two_launchers_at_once_train_each_run_once(
    sweep: SweepDir, losses: dict[str, float | None], launch: Launch
) -> None:
    for launcher in [launch(sweep), launch(sweep)]:
        finish(launcher)
    assert_as_undisturbed(sweep, losses)
    assert all(first_steps(sweep.run(run_id)) == [1] for run_id in losses)


def test_an_interrupt_leaves_checkpoints_and_the_next_launch_goes_on(
    sweep: SweepDir, losses: dict[str, float | None], launch: Launch
) -> None:
    launcher = launch(sweep)
    run = wait_for_mid_run(sweep, launcher)
    launcher.send_signal(signal.SIGINT)
    out, error = launcher.communicate(timeout=PATIENCE_S)
    assert launcher.returncode == 130
    assert error.strip().endswith("interrupted; the same command again goes on from here")
    assert "Traceback" not in out + error
    assert not processes(sweep)
    stopped = next((r for r in map(sweep.run, losses) if not r.record_json.exists() and r.last_attempt()), None)
    assert stopped is not None, f"{run.path.name} ended before the interrupt, and no other had begun"
    assert list(stopped.checkpoints.glob("step-*.pt"))
    done = records(sweep)
    finish(launch(sweep))
    assert_as_undisturbed(sweep, losses, done)
    assert len(first_steps(stopped)) == 2


def test_a_finished_sweep_is_left_alone_and_more_points_train_alone(
    undisturbed: SweepDir, losses: dict[str, float | None], launch: Launch
) -> None:
    before, logs = records(undisturbed), {path: path.stat() for path in undisturbed.runs.glob("worker-*.log")}
    started = time.monotonic()
    out, error = finish(launch(undisturbed))
    assert time.monotonic() - started < 3.0
    assert "6 of 6 runs are done already" in error
    assert "6 done" in out
    assert {path: path.stat().st_mtime_ns for path in logs} == {path: s.st_mtime_ns for path, s in logs.items()}
    assert_as_undisturbed(undisturbed, losses, before)

    finish(launch(undisturbed, "seed=2,3"))
    now = records(undisturbed)
    assert {run_id: now[run_id] for run_id in before} == before
    assert len(now) == N_RUNS + 2
    assert {record.run_id: record.loss for record in undisturbed.records() if record.spec.seed < 3} == losses
    assert [record.spec.seed for record in undisturbed.records()].count(3) == 2
