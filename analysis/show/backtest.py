"""A backtest's rows by law."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def law_backtest(rows: Sequence[Mapping[str, Any]], law: str) -> dict[str, Any]:
    """One law over its cuts: rms error, and the share of all held-out runs inside the intervals."""
    mine = [r for r in rows if r["law"] == law]
    held = sum(r["n_held_out"] for r in mine)
    out = {"law": law, "emphasis": mine[0]["emphasis"], "cuts": len(mine)}
    out["rms_error"] = math.sqrt(sum(r["rms_error"] ** 2 for r in mine) / len(mine))
    for key in ("coverage_50", "coverage_90"):
        known = all(r[key] is not None for r in mine)
        out[key] = sum(r[key] * r["n_held_out"] for r in mine) / held if known else None
    return out
