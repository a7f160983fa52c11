"""Bootstrap by run, leverage, run noise, and what a prediction interval is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from analysis.inference.points import Points
from analysis.inference.solver import HUBER, Robust, Solution, resolve
from analysis.laws.law import Columns, Floats, Law

_MULTINOMIAL_FROM = 50
_RIDGE = 1e-6
_CLIP = 1.5
_CLIPPED_MEAN = 0.778464
_SCALE_STEPS = 100


def resample_weights(data: Points, draws: int, seed: int) -> Floats:
    """(draws, n) weights of a bootstrap over groups: seeds of one cell, or branches of one trunk, go together.

    Counts of drawing with replacement (Efron); below 50 cells Dirichlet weights of the same mean (Rubin 1981), since a
    draw that loses a whole arm of a small grid says nothing about the law.
    """
    rng = np.random.default_rng(seed)
    groups, index = np.unique(data.cell if data.group is None else data.group, return_inverse=True)
    n = len(groups)
    if n >= _MULTINOMIAL_FROM:
        by_cell = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(float)
    else:
        by_cell = n * rng.dirichlet(np.ones(n), size=draws)
    weights: Floats = by_cell[:, index]
    return weights


def bootstrap(
    law: Law,
    data: Points,
    best: Floats,
    draws: int,
    seed: int,
    robust: Robust = HUBER,
    weights: Floats | float = 1.0,
) -> Solution:
    """Refit under resampled runs; rows of `.values` are draws of the parameters. weights: (n,), of the runs in the fit."""
    return resolve(law, data.columns, data.loss, best, resample_weights(data, draws, seed) * weights, robust)


def gradients(law: Law, values: Floats, columns: Columns) -> Floats:
    """(n, p) ∂ln L/∂ln θ at n rows."""
    y, jacobian = law.rows(values[None], columns)
    return np.asarray((jacobian[0] * values[:, None] / y[0]).T)


def influence(law: Law, values: Floats, data: Points, weights: Floats) -> Floats:
    """(p, n) ∂ln θ/∂ln L_i of a weighted least-squares fit: (GᵀWG + λ·I)⁻¹·GᵀW, G from `gradients`, W over its maximum.

    λ is a prior of ten e-folds on every parameter beside run noise of 1%, for those that the runs do not show.
    """
    g, w = gradients(law, values, data.columns), weights / weights.max()
    weighted = (g * w[:, None]).T
    return np.asarray(np.linalg.solve(weighted @ g + _RIDGE * np.eye(len(values)), weighted))


def robust_scale(x: Floats, weights: Floats) -> float:
    """Standard deviation of the bulk of x about 0: Huber's proposal 2 (1964), Σ w·min(x²/s², c²) = β·Σ w with c = 1.5.

    β = E min(Z², c²) for a standard normal Z. Of 45 normal values its own error is .12, that of 1.4826·median |x| .17; with
    two outliers of 5 standard deviations among them it is 8% too high.
    """
    s2 = float(np.average(x**2, weights=weights))
    for _ in range(_SCALE_STEPS):
        clipped = float(np.average(np.minimum(x**2, _CLIP**2 * s2), weights=weights))
        if clipped <= 0 or abs(clipped / (_CLIPPED_MEAN * s2) - 1) < 1e-6:
            break
        s2 = clipped / _CLIPPED_MEAN
    return s2**0.5


@dataclass(frozen=True)
class FormError:
    """How far laws of this kind miss when they extrapolate: standard deviation of ln loss per e-fold of compute."""

    per_efold: float
    freedom: int
    """Degrees of freedom of that estimate: cuts of the backtest, and one for the prior."""
    PRIOR = 0.002
    """0.5% at 10×, 1.1% at 300×: of the size of Gadre et al. 2024's 0.7% at 300× (arXiv 2403.08540); counts as one cut.
    Set so that intervals cover as they say on simulated sweeps (bench/coverage.py)."""

    def sd(self, log_ratio: ArrayLike) -> Floats:
        """At ln(C / largest fitted C); nothing inside the range."""
        return self.per_efold * np.maximum(np.asarray(log_ratio, float), 0.0)


def t_quantile(level: float, freedom: float) -> float:
    """Half-width of a central interval of Student's t, in standard deviations."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + level / 2))
