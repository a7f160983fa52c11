"""Laws that share a forecast: members weighed by backtest, their joint bootstrap, and the backtest of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from analysis.inference.backtest import (
    BASELINE,
    BacktestRow,
    Choice,
    Member,
    fit_members,
    recency,
    row,
    score,
)
from analysis.inference.points import Points
from analysis.inference.solver import log_predictions
from analysis.inference.uncertainty import bootstrap, gradients, influence, t_quantile
from analysis.laws.law import Columns, Floats

_CUT_DRAWS = 60
_LEAST_WEIGHT = 0.02
"""Members below this are left out: they cost as much to resample as the others."""


@dataclass(frozen=True)
class Fitted:
    """A member of an ensemble and its fit."""

    member: Member
    weight: float
    values: Floats
    """(p,)"""
    draws: Floats = field(repr=False)
    """(R, p) bootstrap; row r of all members is the same resample of the runs."""
    influence: Floats = field(repr=False)
    """(p, n) ∂ln θ/∂ln L of each run fitted."""


@dataclass(frozen=True)
class Ensemble:
    """A weighted mean of ln loss over members; with one member it is that law."""

    members: tuple[Fitted, ...]

    def log_loss(self, columns: Columns) -> Floats:
        """(n,) mean ln loss."""
        return self._weights @ self._each(columns)

    def disagreement(self, columns: Columns) -> Floats:
        """(n,) variance of ln loss between the members beyond what resampling the runs makes of it.

        Σ_m w_m ((μ_m − μ̄)² − var_draws(μ_m − μ̄))₊: members that differ by noise alone say nothing about the form.
        """
        if len(self.members) == 1:
            return np.zeros(len(next(iter(columns.values()))))
        each, mean = self._each(columns), self.draws(columns)
        out = np.zeros(each.shape[1])
        for m, apart in zip(self.members, each - self._weights @ each, strict=True):
            by_noise = (log_predictions(m.member.form, m.draws, columns) - mean).var(0)
            out += m.weight * np.maximum(apart**2 - by_noise, 0.0)
        return out

    def parameter_variance(self, columns: Columns, noise: float) -> Floats:
        """(n,) variance of ln loss from the runs' noise: the larger of the bootstrap's and the linearised fit's, noise²·Σ_i a_i².

        a_i is what run i moves the mean by. Where few runs decide, the fit passes through them and a bootstrap, which sees their
        residuals alone, finds too little (MacKinnon and White 1985); where the law does not fit, it finds more.
        """
        resampled = ((self.draws(columns) - self.log_loss(columns)) ** 2).mean(0)
        return np.maximum(resampled, noise**2 * self._leverage(columns)[1])

    def residual_scale(self, data: Points) -> Floats:
        """(n,) standard deviation of the residuals of the runs fitted, over that of their noise: √((I − A)(I − A)ᵀ)_ii.

        Row i of A is what each run moves the prediction of run i by. 0 for a run that the fit passes through.
        """
        own, squares = self._leverage(data.columns, own=True)
        return np.sqrt(np.maximum(1 - 2 * own + squares, 0.0))

    def _leverage(self, columns: Columns, own: bool = False) -> tuple[Floats, Floats]:
        """A_ii, where the rows are the runs fitted, and Σ_j A_ij²."""
        g = np.hstack([m.weight * gradients(m.member.form, m.values, columns) for m in self.members])
        k = np.vstack([m.influence for m in self.members])
        diagonal = np.einsum("np,pn->n", g, k) if own else np.zeros(len(g))
        return diagonal, np.einsum("np,pq,nq->n", g, k @ k.T, g, optimize=True)

    def draws(self, columns: Columns) -> Floats:
        """(R, n) ln loss of each resample of the runs."""
        total = sum(m.weight * log_predictions(m.member.form, m.draws, columns) for m in self.members)
        return np.asarray(total)

    def _each(self, columns: Columns) -> Floats:
        return np.stack([log_predictions(m.member.form, m.values[None], columns)[0] for m in self.members])

    @property
    def _weights(self) -> Floats:
        return np.array([m.weight for m in self.members])


def fit_ensemble(
    data: Points, weights: Mapping[Member, float], draws: int, seed: int, known: Mapping[Member, Floats] | None = None
) -> Ensemble:
    """Fit and resample every member of weight at least .02 of the whole; their weights are scaled to sum to 1.

    known: (p,) parameters of members that are fitted already, on these runs or on more.
    """
    heavy = {m: w for m, w in weights.items() if w >= min(_LEAST_WEIGHT, max(weights.values()))}
    known = known or {}
    values = {**fit_members([m for m in heavy if m not in known], data), **known}
    return _resampled(data, heavy, values, draws, seed)


def _resampled(
    data: Points, weights: Mapping[Member, float], values: Mapping[Member, Floats], draws: int, seed: int
) -> Ensemble:
    total = sum(weights.values())
    fitted = []
    for m, weight in weights.items():
        own = m.weights(data)
        sample = bootstrap(m.form, data, values[m], draws, seed, m.robust, own).values
        fitted.append(Fitted(m, weight / total, values[m], sample, influence(m.form, values[m], data, own)))
    return Ensemble(tuple(fitted))


def backtest_rows(data: Points, choice: Choice, noise: float) -> tuple[BacktestRow, ...]:
    """The ensemble at every cut, then each law under the emphasis that served it best, then the baseline."""
    if not choice.errors:
        return ()
    heavy = {m: w for m, w in choice.weights.items() if w >= _LEAST_WEIGHT}
    best = [
        min((m for m in choice.errors if m.law == law), key=lambda m: score(choice.errors[m]))
        for law in dict.fromkeys(m.law for m in choice.errors)
    ]
    groups = [("ensemble", heavy)] if len(choice.weights) > 1 else []
    groups += [(m.law, {m: 1.0}) for m in best]
    rows = []
    for name, weights in groups:
        for i in range(len(next(iter(choice.errors.values())))):
            values = {m: choice.errors[m][i].values for m in weights}
            emphasis = next(iter(weights)).emphasis if name != "ensemble" else None
            rows.append(_judge(name, emphasis, data, choice.errors[best[0]][i].cut, weights, values, noise))
    if choice.baseline and BASELINE not in {m.law for m in choice.errors}:
        rows += [row(BASELINE, None, data, e.cut, e.error) for e in choice.baseline]
    return tuple(rows)


def _judge(
    name: str,
    emphasis: float | None,
    data: Points,
    cut: float,
    weights: dict[Member, float],
    values: dict[Member, Floats],
    noise: float,
) -> BacktestRow:
    """One cut with the coverage of the interval of parameters, disagreement and run noise (no law-form part)."""
    below, above = data.take(data.log_flops <= cut), data.take(data.log_flops > cut)
    ensemble = _resampled(below, weights, values, _CUT_DRAWS, 0)
    centre = ensemble.log_loss(above.columns)
    error = np.log(above.loss) - centre
    parameter = ensemble.parameter_variance(above.columns, noise)
    sd = np.sqrt(parameter + ensemble.disagreement(above.columns) + noise**2)
    p = max(len(m.form.free) for m in weights)
    freedom = max(below.n_cells - p, 1)
    found = row(name, emphasis, data, cut, error)
    inside = [float((np.abs(error) <= t_quantile(level, freedom) * sd).mean()) for level in (0.5, 0.9)]
    mean_sd = float(np.sqrt(parameter.mean() + ensemble.disagreement(above.columns).mean()))
    return BacktestRow(**{**found.to_dict(), "coverage_50": inside[0], "coverage_90": inside[1], "model_sd": mean_sd})


def summary(rows: Sequence[BacktestRow]) -> dict[str, float]:
    """Recency-weighted rms error over the cuts by law."""
    out = {}
    for law in dict.fromkeys(r.law for r in rows):
        mine = [r.rms_error**2 for r in rows if r.law == law]
        out[law] = float(np.sqrt(recency(len(mine)) @ mine))
    return out
