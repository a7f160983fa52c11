"""Chinchilla's three ways to the compute-optimal model size, side by side (Hoffmann et al. 2022, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.inference.points import Points, compute_levels, frontier_rows
from analysis.laws.surface import Floats, compute_optimal

_LEVEL_WIDTH = 0.2
"""Widest ln C of one IsoFLOP group: runs of one budget differ a little by rounding."""


@dataclass(frozen=True)
class Minimum:
    """The minimum of one IsoFLOP group's parabola."""

    flops: float
    n_params: float
    n_tokens: float
    loss: float
    n_runs: int


def isoflop_minima(data: Points, logs: float = _LEVEL_WIDTH) -> list[Minimum]:
    """Approach 2, first half: for each budget a least-squares parabola of loss in ln N, and its minimum.

    Budgets with fewer than three sizes, a parabola that opens downwards, or a minimum outside their sizes have none.
    """
    level = compute_levels(data, logs)
    found = []
    for k in range(level.max() + 1):
        group = data.take(level == k)
        ln_n = group.x[:, 0]
        if len(np.unique(ln_n.round(6))) < 3 or np.ptp(group.log_flops) > 2 * logs:
            continue
        centre = ln_n.mean()
        a, b, c = np.polyfit(ln_n - centre, group.loss, 2)
        best = -b / (2 * a) if a > 0 else np.inf
        if not ln_n.min() <= best + centre <= ln_n.max():
            continue
        # C/(N·D) varies a little with N where FLOPs are exact: D* from its trend over the group
        per_pair = np.polyfit(ln_n - centre, group.x[:, 2] - group.x[:, 0] - group.x[:, 1], 1)
        ln_c = float(group.log_flops.mean())
        ln_d = ln_c - (best + centre) - float(np.polyval(per_pair, best))
        found.append(
            Minimum(
                float(np.exp(ln_c)),
                float(np.exp(best + centre)),
                float(np.exp(ln_d)),
                float(c - b * b / (4 * a)),
                len(group),
            )
        )
    return found


def power_law(flops: Floats, values: Floats) -> tuple[float, float]:
    """Coefficient and exponent of values = k·C^a by least squares on logs."""
    exponent, intercept = np.polyfit(np.log(flops), np.log(values), 1)
    return float(np.exp(intercept)), float(exponent)


def _power_laws(flops: Floats, n: Floats, d: Floats) -> dict[str, Any]:
    (k_n, a), (k_d, b) = power_law(flops, n), power_law(flops, d)
    return {"n_coefficient": k_n, "n_exponent": a, "d_coefficient": k_d, "d_exponent": b, "points": len(flops)}


def approach_1(data: Points) -> dict[str, Any]:
    """The lower envelope of final losses against compute: its runs' N and D as powers of C."""
    mask = frontier_rows(data)
    _, first = np.unique(data.cell[mask], return_index=True)
    x = data.x[mask][first]
    if len(x) < 3 or np.ptp(x[:, 2]) < 1 or len(np.unique(x[:, 0].round(6))) < 2:
        return {
            "reason": f"only {len(x)} runs on the lower envelope; it takes 3 over a factor of e in compute, two sizes"
        }
    return _power_laws(*(np.exp(x[:, i]) for i in (2, 0, 1)))


def approach_2(data: Points) -> dict[str, Any]:
    """IsoFLOP parabolas: their minima's N and D as powers of C."""
    minima = isoflop_minima(data)
    if len(minima) < 2:
        return {
            "reason": f"{len(minima)} budgets have a minimum inside their sizes; it takes 2, each with at least 3 sizes"
        }
    arrays = (np.array([getattr(m, f) for m in minima]) for f in ("flops", "n_params", "n_tokens"))
    out = _power_laws(*arrays)
    out["minima"] = [
        {"flops": m.flops, "n_params": m.n_params, "n_tokens": m.n_tokens, "loss": m.loss} for m in minima
    ]
    return out


def approach_3(parameters: Mapping[str, float] | None) -> dict[str, Any]:
    """The fitted surface, C = 6·N·D: exponents β/(α+β) and α/(α+β)."""
    if parameters is None or parameters["A"] <= 0 or parameters["B"] <= 0:
        return {"reason": "the fitted law is no surface with both an N and a D term"}
    n, d = compute_optimal(parameters, 6.0)
    total = parameters["alpha"] + parameters["beta"]
    a, b = parameters["beta"] / total, parameters["alpha"] / total
    return {"n_coefficient": n / 6**a, "n_exponent": a, "d_coefficient": d / 6**b, "d_exponent": b}


def approaches(data: Points, parameters: Mapping[str, float] | None) -> dict[str, dict[str, Any]]:
    """All three: N* = n_coefficient·C^n_exponent, D* likewise, or {"reason": why there is none}."""
    return {"1": approach_1(data), "2": approach_2(data), "3": approach_3(parameters)}
