"""Atomic checkpoints of one run: model, optimizer, position in the data, random state, the loop's own counters."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from scaling.files import write_atomic
from scaling.sweepdir import KEPT

KEEP = 2
"""Checkpoints kept: the newest, and one before it in case the newest turns out unreadable."""


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"))


def _passing(folder: Path) -> list[Path]:
    return [path for path in _by_step(folder) if not path.name.endswith(KEPT)]


def save(folder: Path, step: int, state: dict[str, Any], keep: bool = False) -> Path:
    """Write `step-NNNNNNNNN.pt` whole or not at all, then delete all but the newest KEEP.

    Args:
        keep: for good, as `step-NNNNNNNNN.keep.pt`.
    Raises:
        OSError: disk full or read-only; the checkpoints that were there are untouched.
    """
    path = folder / f"step-{step:09d}{KEPT if keep else '.pt'}"
    write_atomic(path, lambda file: torch.save({"step": step, **state}, file))
    for old in _passing(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None; one that cannot is passed over, saying so."""
    return _load_first(reversed(_by_step(folder)))


def load_kept(folder: Path, step: int) -> dict[str, Any] | None:
    """The newest checkpoint that was kept for branches, at `step` or before, and can be read, or None."""
    kept = [path for path in _by_step(folder) if path.name.endswith(KEPT)]
    return _load_first(path for path in reversed(kept) if path.name <= f"step-{step:09d}{KEPT}")


def _load_first(paths: Iterable[Path]) -> dict[str, Any] | None:
    for path in paths:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        except Exception as error:  # torch.load's errors for a spoilt file have no common type
            print(f"checkpoint {path.name} cannot be read ({error!r}): trying the one before", file=sys.stderr)
    return None


def keep_last(folder: Path) -> None:
    """Of a run that is over keep the newest checkpoint, the trained model, and those that branches start from."""
    for old in _passing(folder)[:-1]:
        old.unlink(missing_ok=True)
