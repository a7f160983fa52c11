"""Bootstrap by run, and what a prediction interval is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from analysis.inference.points import Points
from analysis.inference.solver import HUBER, Robust, Solution, resolve
from analysis.laws.law import Floats, Law

_MULTINOMIAL_FROM = 50


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


def t_quantile(level: float, freedom: int) -> float:
    """Half-width of a central interval of Student's t, in standard deviations."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + level / 2))
