"""Atomic checkpoints of one run: model, optimizer, position in the data, random state, the loop's own counters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from scaling.files import write_atomic

KEEP = 2
"""Checkpoints kept: the newest, and one before it in case the newest turns out unreadable."""


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `step-NNNNNNNNN.pt` whole or not at all, then delete all but the newest KEEP.

    Raises:
        OSError: disk full or read-only; the checkpoints that were there are untouched.
    """
    path = folder / f"step-{step:09d}.pt"
    write_atomic(path, lambda file: torch.save({"step": step, **state}, file))
    for old in _by_step(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None; one that cannot is passed over, saying so."""
    for path in reversed(_by_step(folder)):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        except Exception as error:  # torch.load's errors for a spoilt file have no common type
            print(f"checkpoint {path.name} cannot be read ({error!r}): trying the one before", file=sys.stderr)
    return None


def keep_last(folder: Path) -> None:
    """Of a run that is over keep only the newest checkpoint: the trained model."""
    for old in _by_step(folder)[:-1]:
        old.unlink(missing_ok=True)
