"""SIGTERM, SIGINT and SIGUSR2 ask the loop to stop at the next step boundary, with a checkpoint."""

from __future__ import annotations

import signal
from types import FrameType

_received: list[int] = []


class Interrupted(KeyboardInterrupt):
    """The loop stopped because a signal asked for it; a checkpoint was written."""


def _note(signum: int, frame: FrameType | None) -> None:
    if _received and signum == signal.SIGINT:  # twice: do not wait for the step; a scheduler repeats its SIGTERM
        raise KeyboardInterrupt
    _received.append(signum)


def install_handlers() -> None:
    """Take over the stop signals of this process (main thread only)."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(signum, _note)


def stop_requested() -> bool:
    """Whether a stop signal has come."""
    return bool(_received)
