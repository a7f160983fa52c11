"""Rolling-origin backtest: fit the runs below a compute cut, predict those above, at every cut that leaves enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.inference.points import Points, compute_levels, frontier_rows
from analysis.inference.solver import HUBER, Robust, log_predictions, solve
from analysis.inference.uncertainty import FormError, bootstrap, t_quantile
from analysis.laws.law import Law
from analysis.laws.surface import get_law

CANDIDATES = ("chinchilla", "tied", "chinchilla_no_floor", "tied_no_floor")
"""Chinchilla's law and its special cases, from the most general."""

CLEAR_WIN = 0.65
"""A special case replaces Chinchilla's law when its backtest error is below this times that of Chinchilla's law."""

TIE = 1.05
"""Of laws whose backtest errors are within this factor of the least, the one with the fewest parameters is taken."""

_MAX_CUTS = 6
_LEAST_RANGE = 0.7
_DRAWS = 100


@dataclass(frozen=True)
class BacktestRow:
    """One cut: what the runs up to `cut_flops` said about those above. Errors are ln(actual / predicted)."""

    law: str
    cut_flops: float
    n_fitted: int
    n_held_out: int
    ratio: float
    """Largest held-out compute over the cut."""
    mean_error: float
    rms_error: float
    coverage_50: float
    """Share of held-out runs inside the interval of parameters and run noise alone, law-form error not included."""
    coverage_90: float
    mean_log_ratio: float
    """Mean of ln(C / cut) over the held-out runs."""
    parameter_sd: float
    """Bootstrap standard deviation of the mean held-out prediction, ln loss."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def cuts(data: Points, minimum_cells: int) -> list[float]:
    """ln C of up to six cuts between compute levels; below each, at least `minimum_cells` cells over a factor 2 in C."""
    level = compute_levels(data)
    if level.max() + 1 > len(data) / 2:  # no budgets: runs anywhere
        edges = np.quantile(data.log_flops, np.linspace(0.4, 0.9, _MAX_CUTS))
    else:
        edges = np.array([data.log_flops[level == k].max() for k in range(level.max())])
    first = data.log_flops.min() + _LEAST_RANGE
    usable = [float(e) for e in edges if e >= first and (data.log_flops > e).any()]
    good = [e for e in usable if data.take(data.log_flops <= e).n_cells >= minimum_cells]
    if len(good) > _MAX_CUTS:
        good = [good[i] for i in np.unique(np.linspace(0, len(good) - 1, _MAX_CUTS).round().astype(int))]
    return good


def backtest(
    law: Law, data: Points, noise: float, at: Sequence[float] | None = None, robust: Robust = HUBER
) -> tuple[BacktestRow, ...]:
    """Hold out everything above each cut, refit, predict.

    Args:
        noise: standard deviation of ln loss of a run about the law.
        at: cuts as ln C; by default those of `cuts` that leave one run more than the law has parameters.
    """
    if law.on_frontier:
        data = data.take(frontier_rows(data))
    at = cuts(data, len(law.free) + 1) if at is None else at
    rows = []
    for cut in at:
        below, above = data.take(data.log_flops <= cut), data.take(data.log_flops > cut)
        if below.n_cells < len(law.free) or not len(above):
            continue
        best = solve(law, below.columns, below.loss, robust).values[0]
        predicted = log_predictions(law, best[None], above.columns)[0]
        draws = log_predictions(law, bootstrap(law, below, best, _DRAWS, 0, robust).values, above.columns) - predicted
        error = np.log(above.loss) - predicted
        sd = np.sqrt((draws**2).mean(0) + noise**2)
        freedom = max(below.n_cells - len(law.free), 1)
        rows.append(
            BacktestRow(
                law=law.name,
                cut_flops=float(np.exp(cut)),
                n_fitted=len(below),
                n_held_out=len(above),
                ratio=float(np.exp(above.log_flops.max() - cut)),
                mean_error=float(error.mean()),
                rms_error=float(np.sqrt((error**2).mean())),
                coverage_50=float((np.abs(error) <= t_quantile(0.5, freedom) * sd).mean()),
                coverage_90=float((np.abs(error) <= t_quantile(0.9, freedom) * sd).mean()),
                mean_log_ratio=float((above.log_flops - cut).mean()),
                parameter_sd=float(draws.mean(1).std()),
            )
        )
    return tuple(rows)


def score(rows: Sequence[BacktestRow]) -> float:
    """Root mean square over the cuts of their rms errors; infinite without a cut."""
    return float(np.sqrt(np.mean([r.rms_error**2 for r in rows]))) if rows else float("inf")


@dataclass(frozen=True)
class Choice:
    """The law that a fit goes by, and what its rivals are worth."""

    law: Law
    rows: tuple[BacktestRow, ...]
    """The backtest of every candidate."""
    weights: dict[str, float]
    """Of every candidate, (least rms error / its rms error)⁴, summing to 1; empty without a backtest."""


def choose_law(data: Points, noise: float, robust: Robust = HUBER) -> Choice:
    """Chinchilla's law, unless one of its special cases predicts held-out compute clearly better (CLEAR_WIN).

    All candidates are judged at the same cuts: those that leave Chinchilla's law enough runs, or, in a sweep too small
    for that, its special cases.
    """
    laws = [get_law(name) for name in CANDIDATES if len(get_law(name).free) <= data.n_cells]
    at: list[float] = next((c for law in laws if (c := cuts(data, len(law.free) + 1))), [])
    table = {law.name: backtest(law, data, noise, at, robust) for law in laws}
    most = max(len(r) for r in table.values())
    if most == 0:
        return Choice(laws[0], (), {})
    full = [law for law in laws if len(table[law.name]) == most]
    scores = {law.name: score(table[law.name]) for law in full}
    least = min(scores.values())
    best = min((law for law in full if scores[law.name] <= TIE * least), key=lambda law: len(law.free))
    chosen = best if scores[best.name] < CLEAR_WIN * scores[full[0].name] else full[0]
    raw = {name: (scores[best.name] / max(s, 1e-12)) ** 4 for name, s in scores.items()}
    weights = {name: w / sum(raw.values()) for name, w in raw.items()}
    return Choice(chosen, tuple(row for rows in table.values() for row in rows), weights)


def form_error(rows: Sequence[BacktestRow], noise: float) -> FormError:
    """Law-form error per e-fold of compute from a backtest: what its mean errors exceed parameter and run noise by.

    τ² = (prior² + Σ_cuts (ē² − σ_param² − σ_run²/n) / x̄²) / (1 + cuts), each cut's term at least 0, x̄ the mean
    extrapolation ln(C/cut).
    """
    terms = [
        max(r.mean_error**2 - r.parameter_sd**2 - noise**2 / r.n_held_out, 0.0) / r.mean_log_ratio**2 for r in rows
    ]
    tau2 = (FormError.PRIOR**2 + sum(terms)) / (1 + len(terms))
    return FormError(float(np.sqrt(tau2)), 1 + len(terms))
