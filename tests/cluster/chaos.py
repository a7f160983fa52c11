"""A sweep under random accidents: daemons, workers and launchers killed, jobs preempted and requeued."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scaling.sweepdir import SweepDir

sys.path.insert(0, str(Path(__file__).parent))
from slurm_sweeps import STEPS, Sweeps, end, trained_steps, wait_until

GRID = ["model.width=16", "seed=0,1,2,3,4,5"]
SETTINGS = ["launcher.partition=low", "launcher.max_attempts=20", "launcher.job_minutes=0.02"]
PAUSE_S = (1.0, 4.0)
NODE_DOWN_S = (2.0, 14.0)
"""Shorter and longer than the controller waits for a node."""


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to."""

    events: Counter[str]
    runs: int
    done: int
    duplicated: int
    """Runs that somebody trained after their record was there."""
    same_loss: int
    """Runs that end, to the bit, as they do undisturbed."""
    steps_again: float
    """Steps done more than once, over the sweep's steps."""
    wall_s: float


class Chaos:
    """One sweep and what can happen to it."""

    def __init__(self, sweeps: Sweeps, sweep: SweepDir, seed: int) -> None:
        self.sweeps, self.sweep, self.random = sweeps, sweep, random.Random(seed)
        self.launcher = self._launch()
        self._down: list[tuple[float, str]] = []
        """Nodes that are dead, with the time at which they come back."""

    def _launch(self) -> subprocess.Popen[str]:
        return self.sweeps.start(self.sweep, *GRID, *SETTINGS, behaviour={"all": "slow"})

    def disturb(self, count: int) -> Counter[str]:
        """`count` accidents, some seconds between them, while there are runs to disturb."""
        accidents: list[Callable[[], None]] = [
            self.controller, self.node, self.preemption, self.requeue, self.worker, self.launcher_killed
        ]  # fmt: skip
        self.random.shuffle(accidents)
        events: Counter[str] = Counter()
        wait_until(lambda: list(self.sweep.runs.glob("*/checkpoints/step-*.pt")), "no run began")
        for number in range(count):
            if len(self.sweep.records()) == len(self.sweep.plan().runs):
                break
            accident = accidents[number % len(accidents)]
            accident()
            events[accident.__name__] += 1
            self._revive_nodes()
            time.sleep(self.random.uniform(*PAUSE_S))
            if self.launcher.poll() is not None:  # it may refuse to start while the controller is away
                self.launcher.communicate()
                self.launcher = self._launch()
        self._revive_nodes(all_of_them=True)
        return events

    def finish(self) -> None:
        """The same command until nothing is left to do."""
        status, out, error = end(self.launcher)
        for _ in range(2):
            if status == 0:
                return
            status, out, error = end(self._launch())
        raise AssertionError(f"{out}\n{error}")

    def controller(self) -> None:
        self.sweeps.cluster.kill("slurmctld")
        time.sleep(self.random.uniform(0.5, 3))
        self.sweeps.cluster.start("slurmctld")

    def node(self) -> None:
        if not self._down:
            name = self.random.choice(self.sweeps.cluster.NODES)
            self.sweeps.cluster.kill(name)
            self._down.append((time.monotonic() + self.random.uniform(*NODE_DOWN_S), name))

    def _revive_nodes(self, all_of_them: bool = False) -> None:
        for back_s, name in list(self._down):
            if all_of_them or time.monotonic() > back_s:
                self.sweeps.cluster.start(name)
                self._down.remove((back_s, name))

    def _some_job(self) -> str | None:
        jobs = self.sweeps.cluster.jobs("RUNNING")
        return self.random.choice(jobs) if jobs else None

    def preemption(self) -> None:
        if job := self._some_job():
            self.sweeps.cluster.command("scancel", "--signal=TERM", job)

    def requeue(self) -> None:
        if job := self._some_job():
            self.sweeps.cluster.command("scontrol", "requeue", job)

    def worker(self) -> None:
        runs = [self.sweep.run(spec.run_id) for spec in self.sweep.plan().runs]
        if holders := [pid for run in runs if run.is_leased() and (pid := run.holder())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.random.choice(holders), signal.SIGKILL)

    def launcher_killed(self) -> None:
        self.launcher.kill()
        self.launcher.communicate()
        self.launcher = self._launch()


def run_chaos(sweeps: Sweeps, sweep: SweepDir, losses: dict[str, float | None], seed: int, accidents: int) -> Outcome:
    """A sweep of six runs, disturbed `accidents` times, to its end.

    Args:
        losses: of the same runs, undisturbed.
    """
    began = time.monotonic()
    chaos = Chaos(sweeps, sweep, seed)
    events = chaos.disturb(accidents)
    chaos.finish()
    records = sweep.records()
    runs = [spec.run_id for spec in sweep.plan().runs]
    return Outcome(
        events=events,
        runs=len(runs),
        done=sum(record.status == "ok" for record in records),
        duplicated=sum(_trained_after(sweep, record.run_id, record.attempts) for record in records),
        same_loss=sum(record.loss == losses[record.run_id] for record in records),
        steps_again=sum(trained_steps(sweep)) / (STEPS * len(runs)) - 1,
        wall_s=time.monotonic() - began,
    )


def _trained_after(sweep: SweepDir, run_id: str, attempt: int) -> bool:
    run = sweep.run(run_id)
    return any((run.attempt_dir(n) / "metrics.jsonl").exists() for n in range(attempt + 1, run.last_attempt() + 1))


def undisturbed(sweeps: Sweeps, sweep: SweepDir) -> dict[str, float | None]:
    """Final losses of the same runs, trained on this machine without SLURM."""
    status, out, error = sweeps.run(sweep, *GRID, "launcher.workers=2", local=True)
    assert status == 0, f"{out}\n{error}"
    return {record.run_id: record.loss for record in sweep.records()}
