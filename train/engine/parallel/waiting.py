"""How long training waits for other ranks: the host in calls of gloo, a GPU's stream of computation in those of NCCL.

gloo's calls block the host. NCCL's run on the GPU: a host that has queued them goes on, and the stream of computation stands
still until the data are there. Events before and after each place where it may tell for how long; they are read when the GPU
has passed them, a step later at most, so that the host waits for none of them.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

CALLS = (
    *(
        "allreduce",
        "allgather",
        "all_gather_single",
        "_allgather_base",
        "reduce_scatter_single",
        "_reduce_scatter_base",
    ),
    *("all_to_all_single", "alltoall_base", "broadcast", "send", "recv"),
)
"""Of a process group: what a blocking collective on the stream of computation runs in; torch 2.13's names and those before."""

Mark = Callable[[], Any]
"""An event on the stream of computation, or None on another stream or in a thread beside, where nothing of training waits."""


class _Waited(threading.local):
    """By thread, so that a checkpoint written beside training is not counted."""

    seconds = 0.0


class Waits:
    """Seconds waited in stretches from `begin` to `take`.

    Args:
        mark: None where there is no GPU: only the host waits.
    """

    def __init__(self, mark: Mark | None = None) -> None:
        self.mark = mark
        self._host = _Waited()
        self._stalls: list[tuple[Any, Any, float]] = []
        """Event before, event after, seconds that the host itself took between them."""
        self._unread = 0
        """Of the stalls, those of stretches before, which the GPU had not passed."""

    def timed(self, call: Callable[..., Any], blocks_host: bool = False) -> Callable[..., Any]:
        """A call whose wait is counted.

        Args:
            blocks_host: whether it returns when the data are there, where they are on the CPU.
        """

        @functools.wraps(call)
        def run(*args: Any, **options: Any) -> Any:
            before, start = self.mark and self.mark(), time.monotonic()
            try:
                return call(*args, **options)
            finally:
                host_s = time.monotonic() - start
                if blocks_host:
                    self._host.seconds += host_s
                if before is not None and self.mark is not None:
                    self._stalls.append((before, self.mark(), host_s))

        return run

    def begin(self) -> None:
        """Leave out what was waited since `take`."""
        self._host.seconds = 0.0
        del self._stalls[self._unread :]

    def take(self) -> float:
        """Of this thread's host, and of the stream as far as the GPU has come; what the host waited is not counted twice."""
        seconds, self._host.seconds = self._host.seconds, 0.0
        passed = 0
        for before, after, host_s in self._stalls:
            if not after.query():
                break
            seconds += max(0.0, before.elapsed_time(after) / 1e3 - host_s)
            passed += 1
        del self._stalls[:passed]
        self._unread = len(self._stalls)
        return seconds


def is_beside() -> bool:
    """Whether this is a thread that Python code started, as a checkpoint's; training's are the main one and autograd's own."""
    return type(threading.current_thread()) is threading.Thread


def events_on(device: torch.device) -> Mark:
    """Events with times on a GPU's stream of computation, its default one."""
    stream = torch.cuda.default_stream(device)

    def mark() -> torch.cuda.Event | None:
        if is_beside() or torch.cuda.current_stream(device) != stream:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    return mark


waits = Waits()
"""Of this process."""


@functools.cache
def count_waits(device: str) -> None:
    """Have `waits` count those of torch's own calls, which are wrapped once.

    Args:
        device: what this process trains on.
    """
    dist.Work.wait = waits.timed(dist.Work.wait, blocks_host=True)  # type: ignore[method-assign]
    if torch.device(device).type != "cuda":
        return
    waits.mark = events_on(torch.device(device))
    torch.cuda.Stream.wait_event = waits.timed(torch.cuda.Stream.wait_event)  # type: ignore[method-assign]
    for name in CALLS:
        if hasattr(dist.ProcessGroup, name):
            setattr(dist.ProcessGroup, name, waits.timed(getattr(dist.ProcessGroup, name)))
