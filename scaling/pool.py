"""A pool of worker processes over a sweep's runs.

Nothing passes between launcher and worker but files: each worker gets the whole list, claims runs by their leases and
writes records; the launcher watches the folders, restarts workers that died, and gives up a run that keeps killing them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from scaling.errors import InputError
from scaling.files import read_json
from scaling.memory import explain_kill
from scaling.sweepdir import LAUNCH_VARIABLE, RunDir, SweepDir

POLL_S = 0.2
RESPAWN_S = 1.0
"""At least this long between a worker's end and the next one in its place."""
STOP_S = 60.0
"""What a worker has for its last checkpoint when the sweep is interrupted."""
IDLE_EXITS = 5
"""Workers that may end in a row without a run having been finished or tried."""


class WorkerError(RuntimeError):
    """Workers cannot start: the message carries the end of a worker's log."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    log: Path


class WorkerPool:
    """Workers on the open runs of a sweep: those with no record yet that this launch has not given up."""

    def __init__(
        self,
        sweep: SweepDir,
        run_ids: Sequence[str],
        workers: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        max_attempts: int,
        launch: str | None = None,
        logs: Path | None = None,
        gpus: Sequence[str] = (),
    ) -> None:
        """
        Args:
            sweep: where the runs are.
            run_ids: the runs, in the order in which they are to be claimed.
            workers: how many processes at once.
            command: a worker's command line; `--sweep DIR --runs ID,ID,…` is added.
            environment: added to this process's own.
            max_attempts: failures of one run, by an exception or its worker's death, before it is given up.
            launch: whose failures count; None: a launch of its own.
            logs: folder of the workers' output; None: the sweep's runs.
            gpus: devices that the workers share, each on one, turn by turn; none: CUDA's own choice.
        """
        self.sweep = sweep
        self.open = {run_id: sweep.run(run_id) for run_id in run_ids}
        self.failed: dict[str, str] = {}
        """Runs given up, with the reason."""
        self._size, self._command, self._environment = workers, list(command), dict(environment)
        self._max_attempts, self._launch = max_attempts, launch or os.urandom(8).hex()
        self._logs, self._gpus = logs or sweep.runs, list(gpus)
        self._deaths: Counter[str] = Counter()
        self._memory_kills = _memory_kills()
        self._workers: dict[int, _Worker] = {}
        self._idle_exits = 0
        self._spawned_s = 0.0

    def run(self, on_poll: Callable[[], None]) -> None:
        """Work until no run is open, calling `on_poll` now and then. Workers never outlive this call.

        Raises:
            InputError: a worker refused its input.
            WorkerError: workers end again and again without trying a run.
            KeyboardInterrupt: interrupted; the workers have written their checkpoints.
        """
        try:
            while self._close_finished():
                self._reap()
                self._spawn()
                on_poll()
                time.sleep(POLL_S)
        finally:
            self._stop()
            on_poll()

    def _close_finished(self) -> bool:
        """Drop the runs that are done or given up; whether any is left."""
        for run_id in [i for i, run in self.open.items() if run.record_json.exists()]:
            del self.open[run_id]
            self._idle_exits = 0
        for run_id in self.failed:
            self.open.pop(run_id, None)
        return bool(self.open)

    def _reap(self) -> None:
        for slot, worker in list(self._workers.items()):
            status = worker.process.poll()
            if status is None:
                continue
            del self._workers[slot]
            held = [run_id for run_id, run in self.open.items() if run.holder() == worker.process.pid]
            out_of_memory = status == -signal.SIGKILL and self._memory_ran_out()
            for run_id in held:
                if out_of_memory and halve_micro_batch(self.open[run_id]):
                    continue
                self._deaths[run_id] += 1
                if self._deaths[run_id] >= self._max_attempts:
                    run = self.open[run_id]
                    why = explain_kill(run.spec(), _provenance(run)) if out_of_memory else _ending(status)
                    self._give_up(run_id, f"its worker died {self._max_attempts} times: {why}", write=True)
            tried = [run_id for run_id in self.open if self.open[run_id].failures(self._launch)]
            for run_id in tried:
                # a worker that comes to its end (0, or 1 when runs failed) has tried as often as it may
                over = status in (0, 1) and not self.open[run_id].is_leased()
                if over or self.open[run_id].failures(self._launch) >= self._max_attempts:
                    failure = self.open[run_id].failure()
                    self._give_up(run_id, failure["reason"] if failure else "failed")
            if not held and not tried:
                self._count_idle_exit(worker, status)

    def _give_up(self, run_id: str, reason: str, write: bool = False) -> None:
        if write:
            run = self.open[run_id]
            run.write_failure(run.last_attempt(), reason)
        self.failed[run_id] = reason
        for branch, run in self.open.items():
            if branch not in self.failed and run.waits_for() == run_id:
                self._give_up(branch, f"its trunk {run_id} failed: {reason}", write=True)

    def _unclaimed(self) -> list[str]:
        """The runs that a worker could take now: neither done, given up nor held, and no branch whose trunk is to come."""
        return [
            run_id
            for run_id, run in self.open.items()
            if run_id not in self.failed
            and not run.record_json.exists()
            and not run.is_leased()
            and run.waits_for() not in self.open
        ]

    def _memory_ran_out(self) -> bool:
        """Whether the kernel has killed processes of this control group for want of memory since the last look."""
        before, self._memory_kills = self._memory_kills, _memory_kills()
        return self._memory_kills > before

    def _count_idle_exit(self, worker: _Worker, status: int) -> None:
        """A worker ended and had no run: normal when none was left to claim, else it could not start."""
        if status == 0 and not self._unclaimed():
            return
        self._idle_exits += 1
        lines = worker.log.read_text(errors="replace").strip().splitlines()
        if status == 2:
            raise InputError(lines[-1].removeprefix("error: ") if lines else "a worker refused its input")
        if self._idle_exits >= IDLE_EXITS:
            tail = "\n".join(lines[-10:])
            raise WorkerError(f"workers end without training ({_ending(status)}); the end of {worker.log}:\n{tail}")

    def _spawn(self) -> None:
        """Fill the free places, as far as there are runs that nobody holds and no worker is on its way to."""
        free = [slot for slot in range(self._size) if slot not in self._workers]
        if not free or time.monotonic() - self._spawned_s < RESPAWN_S:
            return
        waiting = self._unclaimed()
        if not waiting:
            return
        holders = {run.holder() for run in self.open.values()}
        starting = sum(worker.process.pid not in holders for worker in self._workers.values())
        for slot in free[: max(0, len(waiting) - starting)]:
            self._workers[slot] = self._start(slot)
            self._spawned_s = time.monotonic()

    def _start(self, slot: int) -> _Worker:
        log = self._logs / f"worker-{slot}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        runs = ",".join(run_id for run_id in self.open if run_id not in self.failed)
        own = {"CUDA_VISIBLE_DEVICES": self._gpus[slot % len(self._gpus)]} if self._gpus else {}
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*self._command, "--sweep", str(self.sweep.path), "--runs", runs],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **self._environment, **own, LAUNCH_VARIABLE: self._launch},
                process_group=0,  # a terminal's Ctrl-C goes to the launcher alone, which then asks the workers
            )
        return _Worker(process, log)

    def _stop(self) -> None:
        """Ask the workers to write their checkpoints and end; kill those that do not, or all on a second interrupt."""
        processes = [worker.process for worker in self._workers.values()]
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + STOP_S
        try:
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.wait()
            self._workers.clear()


def halve_micro_batch(run: RunDir) -> bool:
    """Have a run whose last attempt was killed for want of memory tried again with half its micro-batch.

    Returns:
        False where that attempt's was one sequence already, or where it ended before it said what it was.
    """
    provenance = _provenance(run)
    micro_batch, spec = provenance.get("micro_batch_tokens", 0), run.spec()
    if micro_batch <= spec.shape.seq_len:
        return False
    run.write_failure(run.last_attempt(), explain_kill(spec, provenance), out_of_memory_at=micro_batch)
    return True


def _provenance(run: RunDir) -> dict[str, Any]:
    """What the last attempt said that it ran on; empty where it ended before it did."""
    path = run.attempt_dir(run.last_attempt()) / "provenance.json"
    return read_json(path, "provenance") if path.exists() else {}


def _memory_kills() -> int:
    """Processes of this control group that the kernel has killed for want of memory; 0 where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):  # version 2, version 1
                file = f"memory{group}/memory.oom_control" if controllers else f"{group}/memory.events"
                with contextlib.suppress(FileNotFoundError):
                    found = re.search(
                        r"^oom_kill (\d+)", (Path("/sys/fs/cgroup") / file.strip("/")).read_text(), re.M
                    )
                    return int(found.group(1)) if found else 0
    return 0


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """While inside, SIGTERM raises KeyboardInterrupt as SIGINT does (where signals can be handled: the main thread)."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def train_worker() -> list[str]:
    """The command line of the project's own worker."""
    return [sys.executable, "-m", "train.run"]
