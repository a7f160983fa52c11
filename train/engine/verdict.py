"""verdict.json, by which the watch beside a run says how it stands and asks it for a checkpoint, or to stop with one."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

LOOK_S = 1.0
"""Seconds between two looks at the file."""


@dataclass(frozen=True)
class Said:
    """A new verdict."""

    asked: Literal["stop", "checkpoint"] | None
    """What the run is to do; None: nothing, or what was asked before."""
    reason: str | None
    row: dict[str, Any]
    """What it adds to the step's row of metrics.jsonl: watch_action, watch_reason, watch_level, and the forecast of the final
    loss with its 90% interval, watch_final_loss, watch_final_low, watch_final_high."""


class Verdict:
    """The newest verdict. What it asks is heeded once, and not when it was in the file before this object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._looked = time.monotonic()
        self._stamp = self._changed()
        self._heeded = _request(self._read())

    def look(self) -> Said | None:
        """The verdict where it is new, else None. Looks at the file once a second."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return None
        self._looked = now
        stamp = self._changed()
        if stamp is None or stamp == self._stamp:
            return None
        self._stamp = stamp
        said = self._read()
        if said.get("action") not in ("continue", "warn", "checkpoint", "stop"):  # not from the watch
            return None
        is_new = _request(said) != self._heeded
        self._heeded = _request(said)
        action, reason = said["action"], said.get("reason")
        return Said(action if is_new and action in ("checkpoint", "stop") else None, reason, _row(said))

    def _changed(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return None

    def _read(self) -> dict[str, Any]:
        try:
            said = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}


def _request(said: dict[str, Any]) -> tuple[Any, Any]:
    """What tells one request from another: the action, and the window of the alarm behind it."""
    return said.get("action"), said.get("window")


def _row(said: dict[str, Any]) -> dict[str, Any]:
    interval = said.get("final_interval_90")
    low, high = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    values = {name: said.get(name) for name in ("action", "reason", "level", "final_loss")}
    values |= {"final_low": low, "final_high": high}
    return {f"watch_{name}": value for name, value in values.items() if value is not None}
