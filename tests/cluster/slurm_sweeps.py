"""Sweeps launched on a private SLURM in processes of their own, and what must be true of them at the end."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from scaling.sweepdir import RunDir, SweepDir

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from private_slurm import PrivateSlurm  # noqa: E402

TEXT = Path(sysconfig.get_paths()["stdlib"]) / "[a-b]*.py"
SETTINGS = [
    "model=smoke", "model.vocab_size=300", "data=text", f"data.path='{TEXT}'", "tokens=30720", "batch_tokens=256",
    "eval.tokens=4096", "eval.points=2", "sweep.any_commit=true",
]  # fmt: skip
SLURM = [
    "launcher=slurm", "launcher.mem=500M", "launcher.time=5", "launcher.job_minutes=0.05", "launcher.queue_poll_s=1",
    "launcher.checkpoint_every_s=0.2", "launcher.signal_delay_s=60",
]  # fmt: skip
STEPS = 120
PATIENCE_S = 600.0
"""For what takes some seconds on a quiet machine."""


class Sweeps:
    """Starts launchers on the private cluster."""

    def __init__(self, cluster: PrivateSlurm, cache: Path) -> None:
        self.cluster, self.cache = cluster, cache

    def start(
        self, sweep: SweepDir, *settings: str, behaviour: dict[str, str] | None = None, local: bool = False
    ) -> subprocess.Popen[str]:
        """A launcher; `settings` after the common ones, `behaviour` as worker.py reads it."""
        words = [*SETTINGS, *([] if local else SLURM), *settings]
        environment = {**self.cluster.environment, "ISOFLOP_CACHE": str(self.cache), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, str(HERE / "launch.py"), str(sweep.path), *words],
            cwd=HERE.parents[1],
            env={**environment, "BEHAVIOUR": json.dumps(behaviour or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, sweep: SweepDir, *settings: str, behaviour: dict[str, str] | None = None, local: bool = False
    ) -> tuple[int, str, str]:
        """A launcher to its end: exit status and what it said."""
        launcher = self.start(sweep, *settings, behaviour=behaviour, local=local)
        return end(launcher)


def end(launcher: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a launcher."""
    try:
        out, error = launcher.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        launcher.kill()
        out, error = launcher.communicate()
        raise AssertionError(f"not through in {PATIENCE_S} s:\n{out}\n{error}") from None
    return launcher.returncode, out, error


def wait_until(true: Callable[[], object], what: str = "") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def wait_for_mid_run(sweep: SweepDir, launcher: subprocess.Popen[str] | None = None) -> RunDir:
    """A run that is being trained and has a checkpoint."""
    seen: list[RunDir] = []

    def look() -> bool:
        assert launcher is None or launcher.poll() is None, launcher.communicate()
        runs = [RunDir(path.parent.parent) for path in sweep.runs.glob("*/checkpoints/step-*.pt")]
        seen.extend(run for run in runs if run.is_leased() and not run.record_json.exists())
        return bool(seen)

    wait_until(look, "no run was caught in the middle")
    return seen[0]


def job_of(run: RunDir) -> str:
    """The SLURM job that trains a run."""
    lease = run.attempt_dir(run.last_attempt())
    return str(json.loads((lease / "provenance.json").read_text())["slurm"]["job"])


def trained_steps(sweep: SweepDir) -> list[int]:
    """Steps begun in each run over all attempts (worker.py counts them): more than its own where some were done again."""
    totals = []
    for spec in sweep.plan().runs:
        run = sweep.run(spec.run_id)
        totals.append(sum(file.stat().st_size for file in run.attempts.glob("*/steps.count")))
    return totals


def assert_as_undisturbed(sweep: SweepDir, losses: dict[str, float | None]) -> None:
    """Every run once, to the same bit, and none trained after its record."""
    assert {record.run_id: record.loss for record in sweep.records()} == losses
    for record in sweep.records():
        run = sweep.run(record.run_id)
        later = range(record.attempts + 1, run.last_attempt() + 1)
        assert not [n for n in later if (run.attempt_dir(n) / "metrics.jsonl").exists()]
        assert [row["step"] for row in run.metrics()] == list(range(1, STEPS + 1))


def arrays(sweep: SweepDir) -> list[Path]:
    """The folders of the sweep's job arrays."""
    return [path.parent for path in sweep.jobs.glob("*/array.json")]


def finish(launcher: subprocess.Popen[str]) -> str:
    """Wait for a launcher that must end well; what it said."""
    status, out, error = end(launcher)
    assert status == 0, f"{out}\n{error}"
    return out + error
