"""What every test starts from."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

HEADER_BYTES, BLOCK_BYTES, FRAME_BYTES = 7, 32768, 7

settings.register_profile("untimed", deadline=None)  # an example's seconds say how busy the machine is
settings.load_profile("untimed")

# A shell starts its background jobs with SIGINT ignored, and every child inherits that: tests that interrupt would wait.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _records(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a header, then LevelDB's log format (frames of a block, whole or in parts)."""
    data, place, parts = file.read_bytes(), HEADER_BYTES, b""
    while place + FRAME_BYTES <= len(data):
        if BLOCK_BYTES - place % BLOCK_BYTES < FRAME_BYTES:
            place += BLOCK_BYTES - place % BLOCK_BYTES
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + FRAME_BYTES : place + FRAME_BYTES + size]
        place += FRAME_BYTES + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.fixture
def wandb_records() -> Callable[[Path], Iterator[bytes]]:
    """Reads a .wandb file."""
    return _records
