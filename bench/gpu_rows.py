"""The rows of bench/gpu.py, and the processes that measure them, which a failing row may take with it. No torch in here."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from scaling.errors import InputError
from scaling.shape import ModelShape
from scaling.spec import DataSpec, EvalSpec, OptimSpec, RunSpec, ScheduleSpec

WAIT_S = 240.0
"""Longest wait of one process, or stacked run, for the others."""


@dataclass(frozen=True)
class Job:
    """What one row measures."""

    model: str
    shape: ModelShape
    batch_tokens: int
    steps: int
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    compile: Literal["none", "block", "whole"] = "none"
    cuda_graphs: bool = False
    micro_batch_tokens: int | None = None
    """None: the batch in one pass."""
    processes: int = 1
    """Each with a run of its own, all at once."""
    stacked: int = 1
    """Runs that train as one in each process (launcher.share=stacked)."""
    families: bool = False
    """Whether some steps are profiled too."""

    @property
    def setting(self) -> str:
        """What differs from the plain loop."""
        parts: list[str] = [self.precision] if self.precision != "bf16" else []
        parts += [f"compile={self.compile}"] if self.compile != "none" else []
        parts += ["CUDA graphs"] if self.cuda_graphs else []
        parts += [f"micro-batch {self.micro_batch_tokens:,}"] if self.micro_batch_tokens else []
        parts += [f"{self.stacked} stacked"] if self.stacked > 1 else []
        parts += [f"{self.processes} processes"] if self.processes > 1 else []
        return ", ".join(parts) or "plain"

    @property
    def pass_tokens(self) -> int:
        """Tokens of a run in one forward and backward pass."""
        return min(self.batch_tokens, self.micro_batch_tokens or self.batch_tokens)

    def spec(self, seed: int = 0) -> RunSpec:
        """A run long enough for the steps."""
        return RunSpec(
            shape=self.shape,
            data=DataSpec("stdlib"),
            tokens=1000 * self.batch_tokens,
            batch_tokens=self.batch_tokens,
            optim=OptimSpec("adamw", 1e-4),
            schedule=ScheduleSpec("wsd", 0),
            eval=EvalSpec(self.shape.seq_len),
            seed=seed,
            precision=self.precision,
        )


@dataclass(frozen=True)
class Measured:
    """What a process found."""

    began: float
    """On the machine's monotonic clock, seconds; so `ended`."""
    ended: float
    tokens: int
    peak_bytes: int
    """Of the device's memory; 0 on a CPU."""
    parts_s: dict[str, float] = field(default_factory=dict)
    """Seconds of a step's parts, each waited for."""
    families: dict[str, float] = field(default_factory=dict)
    """Seconds of a step by kernel family."""
    busy: float = 0.0
    """Share of the profiled time in which a kernel ran."""


class RowError(Exception):
    """A row has no figure; the message says why."""


class Workers:
    """Processes that measure at the same time; they stay from row to row, until one fails."""

    def __init__(self, count: int, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._barrier = context.Barrier(count, timeout=WAIT_S)  # lives as long as a process may still open it
        self._ends: list[Connection] = []
        self._processes = []
        for _ in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._barrier, device), daemon=True)
            process.start()
            theirs.close()
            self._ends.append(mine)
            self._processes.append(process)

    @property
    def alive(self) -> bool:
        """Whether they can be called again."""
        return bool(self._ends)

    def call(self, name: str, *args: Any, limit_s: float) -> list[Any]:
        """What `CALLS[name](*args)` returns in each process.

        Raises:
            RowError: one of them raised, died, or took longer than limit_s. All are ended then (`alive`), but for one alone
                that refused, or ran out of memory.
        """
        until = time.monotonic() + limit_s
        results: dict[Any, Any] = {}
        for end in self._ends:
            with contextlib.suppress(OSError):  # dead: said where it should answer
                end.send((name, args))
        reason, is_sound = None, False
        while reason is None and len(results) < len(self._ends):
            waiting = [end for end in self._ends if end not in results]
            answered = wait(waiting, max(0.0, until - time.monotonic()))
            ready = [end for end in waiting if end in answered]
            if not ready:
                reason = f"took longer than {limit_s:.0f} s"
            for end in ready:
                try:
                    results[end], failure, is_sound = end.recv()
                except (EOFError, OSError):
                    failure = "its process died"
                reason = reason or failure
        if reason is not None:
            if is_sound and len(self._ends) == 1:
                self._barrier.reset()
            else:
                self.close()
            raise RowError(reason)
        return [results[end] for end in self._ends]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._ends = []


def _serve(end: Connection, barrier: Any, device: str) -> None:
    """A process of Workers: answers calls until its parent is gone."""
    import torch
    from gpu_measure import CALLS, explain

    torch.set_num_threads(1)
    while True:
        try:
            name, args = end.recv()
        except EOFError:
            return
        try:
            extra = (device, barrier.wait) if name == "measure" else (device,)
            end.send((CALLS[name](*args, *extra), None, True))
        except threading.BrokenBarrierError:
            time.sleep(1.0)  # another process says why
            end.send((None, "another of its processes failed", False))
        except Exception as error:
            barrier.abort()
            end.send((None, explain(error), isinstance(error, (InputError, torch.OutOfMemoryError))))
