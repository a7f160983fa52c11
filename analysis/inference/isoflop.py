"""Chinchilla's three ways to the compute-optimal model size, side by side (Hoffmann et al. 2022, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from analysis.inference.points import Points, compute_levels, frontier_rows
from analysis.laws.law import Floats
from analysis.laws.power import compute_optimal
from scaling.errors import unknown

Curve = Literal["parabola", "akima"]
"""What is laid through the losses of one budget."""
Frontier = Literal["envelope", "hull"]
"""Which runs count as the best of their compute: `frontier_rows`, or the vertices of `hull_rows`."""

_LEVEL_WIDTH = 0.2
"""Widest ln C of one IsoFLOP group: runs of one budget differ a little by rounding."""


@dataclass(frozen=True)
class Minimum:
    """The minimum of one IsoFLOP group's curve."""

    flops: float
    n_params: float
    n_tokens: float
    loss: float
    n_runs: int


@dataclass(frozen=True)
class LossSurface:
    """A fitted surface as the approaches are compared on it; C is counted as the runs count it."""

    loss: Callable[[Floats, Floats], Floats]
    """Loss at N and D, arrays of one shape."""
    optimum: Callable[[float], tuple[float, float]]
    """N*, D* of a budget in FLOPs."""
    flops_per_token: Callable[[Floats], Floats] = lambda n: 6.0 * n
    """Training FLOPs of one token as a function of N."""


def isoflop_minima(
    data: Points, logs: float = _LEVEL_WIDTH, curve: Curve = "parabola", *, outside: bool = False
) -> list[Minimum]:
    """Approach 2, first half: for each budget a curve of loss in ln N, and its minimum.

    Budgets with fewer than three sizes, a parabola that opens downwards, or a minimum not inside their sizes have
    none.

    Args:
        logs: widest gap in ln C between neighbours of one budget.
        curve: "parabola": least squares (Hoffmann et al. 2022, section 3.2), smooths noise, biased where the sizes
            reach far or lie off the optimum; "akima": Akima's piecewise cubic through each size's mean loss
            (Porian et al. 2024, arXiv 2406.19146), follows the losses and their noise.
        outside: whether a parabola's minimum counts outside the sizes too, where no run vouches for it.
    Raises:
        InputError: unknown curve.
    """
    if curve not in get_args(Curve):
        raise unknown("curve", curve, get_args(Curve))
    level = compute_levels(data, logs)
    found = []
    for k in range(level.max() + 1):
        group = data.take(level == k)
        ln_n = group.x[:, 0]
        if len(np.unique(ln_n.round(6))) < 3 or np.ptp(group.log_flops) > 2 * logs:
            continue
        centre = ln_n.mean()
        if curve == "parabola":
            lowest = _parabola_minimum(ln_n - centre, group.loss, outside)
        else:
            lowest = _akima_minimum(ln_n - centre, group.loss)
        if lowest is None:
            continue
        best, loss = lowest
        # C/(N·D) varies a little with N where FLOPs are exact: D* from its trend over the group
        per_pair = np.polyfit(ln_n - centre, group.x[:, 2] - group.x[:, 0] - group.x[:, 1], 1)
        ln_c = float(group.log_flops.mean())
        ln_d = ln_c - (best + centre) - float(np.polyval(per_pair, best))
        found.append(
            Minimum(float(np.exp(ln_c)), float(np.exp(best + centre)), float(np.exp(ln_d)), loss, len(group))
        )
    return found


def _parabola_minimum(z: Floats, loss: Floats, outside: bool) -> tuple[float, float] | None:
    a, b, c = np.polyfit(z, loss, 2)
    best = -b / (2 * a) if a > 0 else np.inf
    found = a > 0 if outside else z.min() <= best <= z.max()
    return (float(best), float(c - b * b / (4 * a))) if found else None


def _akima_minimum(z: Floats, loss: Floats) -> tuple[float, float] | None:
    from scipy.interpolate import Akima1DInterpolator

    sizes, index = np.unique(z.round(9), return_inverse=True)
    through = Akima1DInterpolator(sizes, np.bincount(index, loss) / np.bincount(index))
    level = through.derivative().roots(extrapolate=False)
    candidates = np.concatenate([sizes[[0, -1]], level[np.isfinite(level)]])
    values = through(candidates)
    best = int(np.argmin(values))
    return (float(candidates[best]), float(values[best])) if sizes[0] < candidates[best] < sizes[-1] else None


def power_law(flops: Floats, values: Floats) -> tuple[float, float]:
    """Coefficient and exponent of values = k·C^a by least squares on logs."""
    exponent, intercept = np.polyfit(np.log(flops), np.log(values), 1)
    return float(np.exp(intercept)), float(exponent)


def _power_laws(flops: Floats, n: Floats, d: Floats) -> dict[str, Any]:
    (k_n, a), (k_d, b) = power_law(flops, n), power_law(flops, d)
    return {"n_coefficient": k_n, "n_exponent": a, "d_coefficient": k_d, "d_exponent": b, "points": len(flops)}


def hull_rows(data: Points) -> np.ndarray:
    """Mask of the vertices of the lower convex hull of ln loss against ln C, up to the lowest loss.

    Stricter than the envelope: a run also has to lie below the chord of its neighbours (McLeish et al. 2025,
    arXiv 2502.06857), so that sparse sizes do not pull the frontier. Seeds of one cell stand together, by their mean.
    """
    _, cell = np.unique(data.cell, return_inverse=True)
    count = np.bincount(cell)
    x, y = (np.bincount(cell, v) / count for v in (data.log_flops, np.log(data.loss)))
    hull: list[int] = []
    for i in np.lexsort((y, x)):
        while len(hull) > 1 and _turns_up(x, y, hull[-2], hull[-1], i) <= 0:
            hull.pop()
        hull.append(int(i))
    mask: np.ndarray = np.isin(cell, hull[: int(np.argmin(y[hull])) + 1])
    return mask


def _turns_up(x: Floats, y: Floats, a: int, b: int, c: int) -> float:
    return float((x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a]))


def approach_1(data: Points, frontier: Frontier = "envelope") -> dict[str, Any]:
    """The lower envelope of final losses against compute: its runs' N and D as powers of C.

    Raises:
        InputError: unknown frontier.
    """
    if frontier not in get_args(Frontier):
        raise unknown("frontier", frontier, get_args(Frontier))
    mask = (frontier_rows if frontier == "envelope" else hull_rows)(data)
    _, first = np.unique(data.cell[mask], return_index=True)
    x = data.x[mask][first]
    if len(x) < 3 or np.ptp(x[:, 2]) < 1 or len(np.unique(x[:, 0].round(6))) < 2:
        return {
            "reason": f"only {len(x)} runs on the lower {frontier}; it takes 3 over a factor of e in compute, two sizes"
        }
    return _power_laws(*(np.exp(x[:, i]) for i in (2, 0, 1)))


def approach_2(data: Points, curve: Curve = "parabola", *, outside: bool = False) -> dict[str, Any]:
    """IsoFLOP curves: their minima's N and D as powers of C (`curve`, `outside`: see `isoflop_minima`).

    Raises:
        InputError: unknown curve.
    """
    minima = isoflop_minima(data, curve=curve, outside=outside)
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


def approaches(
    data: Points,
    parameters: Mapping[str, float] | None,
    curve: Curve = "parabola",
    frontier: Frontier = "envelope",
) -> dict[str, dict[str, Any]]:
    """All three: N* = n_coefficient·C^n_exponent, D* likewise, or {"reason": why there is none}."""
    return {"1": approach_1(data, frontier), "2": approach_2(data, curve), "3": approach_3(parameters)}


def at_budget(approach: Mapping[str, Any], budget_flops: float) -> tuple[float, float]:
    """N*, D* of an approach that has no "reason": coefficient·C^exponent."""
    n, d = (approach[f"{v}_coefficient"] * budget_flops ** approach[f"{v}_exponent"] for v in ("n", "d"))
    return float(n), float(d)


def approach_2_bias(
    data: Points,
    surface: LossSurface,
    budgets: Sequence[float],
    curve: Curve = "parabola",
    *,
    outside: bool = False,
) -> dict[str, Any]:
    """What approach 2 gets wrong on this grid without any noise (Czech et al. 2026, arXiv 2603.22339).

    Approach 2 on the surface's own losses at exactly the runs' N and D, against the surface's optimum: the error of a
    parabola over sizes that reach far, or whose centre drifts off the optimum from budget to budget.

    Args:
        budgets: FLOPs at which N* and D* are compared.
        curve: and `outside`: as approach 2 is run on the data (see `isoflop_minima`).
    Returns:
        {"budgets": [{"budget_flops", "n_params", "n_tokens"}]} with relative errors (0.1: 10% too large), or
        {"reason": why approach 2 has no answer on this grid}.
    """
    n, d = np.exp(data.x[:, 0]), np.exp(data.x[:, 1])
    replay = approach_2(dataclasses.replace(data, loss=np.asarray(surface.loss(n, d), float)), curve, outside=outside)
    if "reason" in replay:
        return {"reason": replay["reason"]}
    rows = []
    for c in budgets:
        pairs = zip(at_budget(replay, c), surface.optimum(c), strict=True)
        n_bias, d_bias = (float(found / true - 1) for found, true in pairs)
        rows.append({"budget_flops": float(c), "n_params": n_bias, "n_tokens": d_bias})
    return {"budgets": rows}


def disagreement(
    found: Mapping[str, Mapping[str, Any]], surface: LossSurface, budget_flops: float
) -> dict[str, dict[str, float]]:
    """How far each approach lies from the surface's optimum at a budget, and the compute that following it wastes.

    wasted = 1 − C′/C, where the surface's optimum at C′ has the loss that the approach's N has with the whole of C.

    Args:
        found: what `approaches` returned; those with a "reason" are left out.
    Returns:
        approach → {"n_params", "n_tokens": as it gives them; "n_vs_surface", "d_vs_surface": relative differences;
        "wasted_compute": fraction of the budget}.
    """
    n_best, d_best = surface.optimum(budget_flops)
    out = {}
    for name, approach in found.items():
        if "reason" in approach:
            continue
        n, d = at_budget(approach, budget_flops)
        out[name] = {
            "n_params": n,
            "n_tokens": d,
            "n_vs_surface": n / n_best - 1,
            "d_vs_surface": d / d_best - 1,
            "wasted_compute": wasted_compute(surface, n, budget_flops),
        }
    return out


def wasted_compute(surface: LossSurface, n_params: float, budget_flops: float) -> float:
    """Fraction of a budget lost by spending all of it on n_params instead of N*: 1 − C′/C (see `disagreement`)."""
    n = np.array([n_params])
    reached = float(surface.loss(n, budget_flops / surface.flops_per_token(n))[0])

    def excess(ln_ratio: float) -> float:
        n_best, d_best = surface.optimum(budget_flops * float(np.exp(ln_ratio)))
        return float(surface.loss(np.array([n_best]), np.array([d_best]))[0]) - reached

    if excess(0.0) >= 0:
        return 0.0
    low = -1.0
    while excess(low) < 0 and low > -64:
        low *= 2
    high = 0.0
    for _ in range(48):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) >= 0 else (low, middle)
    return float(-np.expm1(high))
