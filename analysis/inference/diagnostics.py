"""What a fit rests on: residuals, runs that stand out, what leaving a run out changes, what the runs do not identify.

Nothing is left out here: the effects say what would change, the user decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.inference.fitting import LARGE, FitResult
from analysis.inference.points import Points, frontier_rows, points
from analysis.inference.solver import HUBER, Robust, log_predictions, resolve
from analysis.laws.law import Floats, Law, complete
from analysis.runs import Runs

OUTLIER = 3.5
"""|z| above which a run stands out (Iglewicz and Hoaglin 1993, on robust z-scores)."""
ILL_CONDITIONED = 1e5
"""Condition number above which some combination of the parameters is known some 300 times worse than another."""
_MAD = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""
_LEAST_SCALE = 1e-5
"""Of ln loss: no evaluation is more exact."""
_ALL_BELOW = 500
"""Up to so many runs each is left out once; beyond, those that stand out most and those of most compute."""
_MOST = 20
_INFLUENTIAL = 3
_LISTED = 10_000
_LEAST_RANGE = 1e-3
"""Of ln loss, over all runs."""
_LEAST_RANGE_FLOPS = 0.2
"""Of ln C, over all runs: one budget."""


@dataclass(frozen=True)
class Residual:
    """How far one run lies from the fit."""

    run_id: str
    flops: float
    residual: float
    """ln(actual / predicted) by the reported law."""
    residual_ensemble: float
    """The same by what predicts."""
    z: float
    """(residual − median) / scale, the scale a robust standard deviation (1.4826·MAD), at least the seeds' noise."""
    z_ensemble: float


@dataclass(frozen=True)
class Effect:
    """What fitting without one run changes."""

    run_id: str
    z: float
    """Of the run, by the reported law."""
    parameters: dict[str, float]
    """New value − old, of each free parameter of the reported law; empty above LARGE runs, of which none matters."""
    law_loss_at_target: float | None
    """New / old − 1, of the reported law's loss at the target; None above LARGE runs."""
    loss_at_target: float | None
    """The same of the forecast, the ensemble's."""


@dataclass(frozen=True)
class Diagnostics:
    """Residuals of the runs, and the effects of those that matter."""

    residuals: tuple[Residual, ...]
    """Of every run; of more than 10,000, those with the largest |z|."""
    scale: float
    """Standard deviation of ln loss that z by the reported law is in units of."""
    n_outliers: int
    outliers: tuple[Effect, ...]
    """Runs that stand out from both law and ensemble on one side, the furthest first, at most 20. Above the law
    (z > 0) is where mis-tuned runs lie: tuning that is off only raises loss."""
    influential: tuple[Effect, ...]
    """The other runs whose absence moves the reported law's loss at the target most."""
    identified: dict[str, bool]
    """Of each parameter of the reported law."""
    identification: tuple[str, ...]
    """In words, what the runs leave open; empty when nothing."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def diagnose(fit: FitResult, runs: Runs, target: tuple[float, float] | None, robust: Robust = HUBER) -> Diagnostics:
    """Residuals, outliers, influence and identification of a fit.

    Args:
        runs: that `fit` was fitted on.
        target: N and D at which the effect on the predicted loss is told; None: those of the largest run, for a law that
            needs more than N and D.
        robust: the loss that the reported law was fitted with.
    """
    data, law = points(runs), fit.surface
    data = data.take(frontier_rows(data)) if law.on_frontier else data
    values = law.values(fit.parameters)
    by_law = np.log(data.loss) - log_predictions(law, values[None], data.columns)[0]
    z, scale = _z_scores(by_law, len(law.free), fit.seed_noise)
    z_ensemble, _ = _z_scores(fit.residuals, len(law.free), fit.seed_noise)
    columns = (np.exp(data.log_flops), by_law, fit.residuals, z, z_ensemble)
    furthest = np.argsort(-np.abs(z), kind="stable")
    listed = np.sort(furthest[:_LISTED])
    residuals = tuple(Residual(data.run_ids[i], *(float(c[i]) for c in columns)) for i in listed)
    out = furthest[stands_out(z, z_ensemble)[furthest]]
    outliers, influential = _effects(fit, data, values, z, out[:_MOST], target, robust)
    return Diagnostics(
        residuals, scale, len(out), outliers, influential, identified(fit, data), _identification(fit, data, robust)
    )


def stands_out(z: Floats, z_ensemble: Floats) -> np.ndarray:
    """Mask of the runs that are far from both the law and the ensemble, on one side."""
    mask: np.ndarray = (np.minimum(np.abs(z), np.abs(z_ensemble)) > OUTLIER) & (z * z_ensemble > 0)
    return mask


def _z_scores(r: Floats, parameters: int, seeds: float | None) -> tuple[Floats, float]:
    """z and its scale: 1.4826·median of the n − p largest |r − median r|.

    A nearly absolute loss lets the law go through p runs, whose residuals say nothing of the noise (Maronna, Martin and
    Yohai 2006, section 4.4.2).
    """
    centred = r - np.median(r)
    size = np.sort(np.abs(centred))[min(parameters, len(r) - 1) :]
    scale = max(_MAD * float(np.median(size)), seeds or 0.0, _LEAST_SCALE)
    return centred / scale, scale


def _effects(
    fit: FitResult,
    data: Points,
    values: Floats,
    z: Floats,
    outliers: np.ndarray,
    target: tuple[float, float] | None,
    robust: Robust,
) -> tuple[tuple[Effect, ...], tuple[Effect, ...]]:
    """Of the outliers, and of the runs whose absence moves the law's loss at the target most.

    One batched refit of the law with each candidate left out, and one of each member with each reported run left out.
    """
    law, n = fit.surface, len(data)
    if n > LARGE:
        return tuple(Effect(data.run_ids[i], float(z[i]), {}, None, None) for i in outliers), ()
    if data.n_cells <= len(law.free):
        return (), ()
    candidates = np.arange(n)
    if n > _ALL_BELOW:
        candidates = np.union1d(outliers, [*np.argsort(-np.abs(z))[:_MOST], *np.argsort(data.log_flops)[-_MOST:]])
    refit = resolve(law, data.columns, data.loss, values, _without(candidates, n), robust).values
    there: Mapping[str, Floats] = data.take(np.array([np.argmax(data.log_flops)])).columns
    if target is not None:
        pairs = target[0] * target[1]
        there = complete({"n_params": [target[0]], "n_tokens": [target[1]], "flops": [6 * fit.flops_ratio * pairs]})
    moved = log_predictions(law, refit, there)[:, 0] - log_predictions(law, values[None], there)[0, 0]
    others = candidates[np.argsort(-np.abs(moved))]
    reported = np.concatenate([outliers, others[~np.isin(others, outliers)][:_INFLUENTIAL]])
    rows = np.searchsorted(candidates, reported)
    shifts = _ensemble_shift(fit, data, reported, there)
    effects = tuple(
        Effect(
            data.run_ids[i],
            float(z[i]),
            dict(zip(law.free, map(float, refit[k] - values), strict=True)),
            float(np.expm1(moved[k])),
            float(np.expm1(shift)),
        )
        for i, k, shift in zip(reported, rows, shifts, strict=True)
    )
    return effects[: len(outliers)], effects[len(outliers) :]


def _without(rows: np.ndarray, n: int) -> Floats:
    """(len(rows), n) weights: 0 at one run each, 1 elsewhere."""
    weights = np.ones((len(rows), n))
    weights[np.arange(len(rows)), rows] = 0.0
    return weights


def _ensemble_shift(fit: FitResult, data: Points, rows: np.ndarray, there: Mapping[str, Floats]) -> Floats:
    """(len(rows),) change of the ensemble's ln loss at one point when each run is left out, weights of members kept."""
    shift = np.zeros(len(rows))
    for m in fit.ensemble.members:
        form, own = m.member.form, m.member.weights(data)
        refit = resolve(form, data.columns, data.loss, m.values, own * _without(rows, len(data)), m.member.robust)
        before = log_predictions(form, m.values[None], there)[0, 0]
        shift += m.weight * (log_predictions(form, refit.values, there)[:, 0] - before)
    return shift


def identified(fit: FitResult, data: Points) -> dict[str, bool]:
    """Whether the runs say what a parameter is.

    Not identified: a floor (E, L∞) whose draws reach 0, or of runs of one compute budget; another parameter that is 0, or of which 90% of the draws span a
    factor of more than 3 (30 for a coefficient, which carries its exponent's error many times over); all but the floor
    where the runs do not tell N from D; all where a law goes through every run. A parameter that the law holds or ties
    counts as identified.
    """
    coefficients = {"A", "B"} | {q.name for q in fit.surface.domain if q.linear}
    apart = fit.surface.on_frontier or inseparable(data) is None
    out = {}
    for name, draws in fit.samples.items():
        low, high = (float(q) for q in np.quantile(draws, (0.05, 0.95)))
        if name not in fit.surface.free:
            out[name] = True
        elif data.n_cells <= len(fit.surface.free):
            out[name] = False
        elif name in ("E", "L_inf"):
            reaches_0 = float(np.mean(draws < 0.05 * np.median(data.loss))) > 0.025
            out[name] = not reaches_0 and bool(np.ptp(data.log_flops) > _LEAST_RANGE_FLOPS)
        elif low < 0:
            out[name] = high < 0
        else:
            out[name] = apart and fit.parameters[name] > 0 and high <= (30 if name in coefficients else 3) * low
    return out


def beyond_n_and_d(law: Law) -> list[str]:
    """The variables that a law needs and that N and D do not give, so that it cannot be asked about a budget."""
    return [name for name in law.variables if name not in complete({"n_params": 1.0, "n_tokens": 1.0})]


def inseparable(data: Points) -> str | None:
    """Why the runs cannot tell N from D; None when they can."""
    if (data.x[:, 1] - data.x[:, 0]).std() < 0.1:
        return "the runs lie on one tokens-per-parameter ray"
    if np.ptp(np.log(data.loss)) < _LEAST_RANGE:
        return f"the losses differ by less than {_LEAST_RANGE:.1%}: is it the right column?"
    return None


def _identification(fit: FitResult, data: Points, robust: Robust) -> tuple[str, ...]:
    """What the data lack, condition and starts in words."""
    out = []
    if data.n_cells <= len(fit.surface.free):
        out.append(
            f"as many parameters of {fit.law} as different runs: it goes through all of them, and nothing measures its error; "
            "add runs"
        )
    varies = np.ptp(data.log_flops) > 1 and np.ptp(np.log(data.loss)) > _LEAST_RANGE
    if varies and np.corrcoef(data.log_flops, np.log(data.loss))[0, 1] > -0.1:
        out.append("loss hardly falls with compute over these runs: is it the right column, of finished runs only?")
    if fit.condition > ILL_CONDITIONED:
        out.append(
            f"condition number {fit.condition:.1g}: some combination of the parameters of {fit.law} is hardly measured; "
            "predictions inside the runs' range are safe, single parameters are not"
        )
    if fit.starts_agreeing < max(2, fit.starts // 4):
        out.append(
            f"{fit.starts_agreeing} of {fit.starts} starts of the solver reached the minimum of {fit.law} under the "
            f"{robust.name} loss: it has others nearly as good"
        )
    return tuple(out)
