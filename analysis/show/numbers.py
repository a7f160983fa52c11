"""How numbers are written: 1.2M parameters, 3.0e12 FLOPs, 2.361 nats, +0.4%."""

from __future__ import annotations

import math

PREFIXES = ("", "k", "M", "B", "T", "P", "E")
"""As the field writes counts: B for 1e9."""


def si(value: float, digits: int = 3) -> str:
    """A count with `digits` significant digits and a letter for its thousands: 45.3M."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.{digits - 1}e}")  # round first: 999,999 is 1M
    if abs(value) < 1:
        return f"{value:.{digits}g}"
    power = min(math.floor(math.log10(abs(value)) / 3 + 1e-9), len(PREFIXES) - 1)
    scaled = value / 1000**power
    text = f"{scaled:.{max(digits - len(str(int(abs(scaled)))), 0)}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + PREFIXES[power]


def flops(value: float, digits: int = 2) -> str:
    """FLOPs: 3.02e12."""
    mantissa, _, exponent = f"{value:.{digits}e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def percent(ratio: float, digits: int = 2) -> str:
    """A signed relative difference: +0.43%."""
    return f"{100 * ratio:+.{digits}f}%"


def share(value: float | None) -> str:
    """A share: 94%; a dash where there is none."""
    return "–" if value is None else f"{value:.0%}"


def interval(pair: tuple[float, float] | list[float], digits: int = 3) -> str:
    """An interval: 2.310 – 2.395."""
    return f"{pair[0]:.{digits}f} – {pair[1]:.{digits}f}"


def rounded(value: float, low: float, high: float) -> tuple[str, str]:
    """A value and its interval with the digits that the interval supports: 0.34, "0.32 – 0.37"."""
    half = (high - low) / 2
    if not (math.isfinite(half) and half > 0):
        return f"{value:.4g}", f"{low:.4g} – {high:.4g}"
    place = math.floor(math.log10(half))
    shown = [round(v, -place) for v in (value, low, high)]
    plain = place > -6 and max(map(abs, shown)) < 1e7
    text = [f"{v:.{max(-place, 0)}f}" if plain else f"{v:.2g}".replace("e+", "e") for v in shown]
    return text[0], f"{text[1]} – {text[2]}"


def number(value: object) -> str:
    """A table's cell: counts grouped or as 1.5e12, floats to five digits, None and NaN as a dash, the rest as it is."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and abs(value) < 1e10:
        return f"{value:,}"
    if isinstance(value, (int, float)):
        return f"{value:.5g}".replace("e+", "e")
    return str(value)
