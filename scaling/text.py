"""Text for a reader: aligned tables and times."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, right-aligned in columns; a last column without a heading is left as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if not rows[0][-1]:
        widths[-1] = 0
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def readable_time(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 3.1 min, 5.0 h, 12 days."""
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.0f} days"
