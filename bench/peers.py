"""The usual ways to fit L = E + A/N^α + B/D^β, written plainly with scipy: what the benches hold `fit_law` against."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp

Floats = NDArray[np.float64]

SINGLE_START = (6.0, 6.0, 0.5, 0.35, 0.35)
"""ln A, ln B, ln E, α, β near every published fit."""
GRID = np.array(
    list(itertools.product(range(0, 30, 5), range(0, 30, 5), np.arange(-1, 1.5, 0.5), *[np.arange(0, 2.5, 0.5)] * 2)),
    float,
)
"""The 4,500 starts of Hoffmann et al. 2022 (arXiv 2203.15556, appendix D.4): ln A, ln B, ln E, α, β."""


def huber_objective(
    v: Floats, ln_n: Floats, ln_d: Floats, ln_loss: Floats, delta: float = 1e-3
) -> tuple[float, Floats]:
    """Summed Huber loss of ln L̂ − ln L and its gradient; v = (ln A, ln B, ln E, α, β), L̂ by log-sum-exp."""
    a, b, e, alpha, beta = v
    terms = np.stack([a - alpha * ln_n, b - beta * ln_d, np.full_like(ln_n, e)])
    total = logsumexp(terms, axis=0)
    r = total - ln_loss
    share = np.exp(terms - total)
    psi = np.clip(r, -delta, delta)
    size = np.abs(r)
    f = np.where(size <= delta, r * r / 2, delta * (size - delta / 2)).sum()
    gradient = [*(share @ psi), -(psi * share[0] * ln_n).sum(), -(psi * share[1] * ln_d).sum()]
    return float(f), np.array(gradient)


def best_of_grid(ln_n: Floats, ln_d: Floats, ln_loss: Floats, count: int = 1, delta: float = 1e-3) -> Floats:
    """(count, 5): the starts of GRID with the lowest objective."""
    a, b, e, alpha, beta = GRID.T[:, :, None]
    total = np.logaddexp(np.logaddexp(a - alpha * ln_n, b - beta * ln_d), e)
    size = np.abs(total - ln_loss)
    f = np.where(size <= delta, size**2 / 2, delta * (size - delta / 2)).sum(1)
    starts: Floats = GRID[np.argsort(f, kind="stable")[:count]]
    return starts


def fit(starts: ArrayLike, n: ArrayLike, d: ArrayLike, loss: ArrayLike, tight: bool = False) -> dict[str, float]:
    """The lowest minimum that L-BFGS-B finds from the starts, no bounds.

    Args:
        tight: go on to convergence; False: scipy's own tolerances, which stop early on an objective this small.
    """
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 5000, "maxfun": 20000} if tight else {}
    logs = np.log(n), np.log(d), np.log(loss)
    found = [
        minimize(huber_objective, s, logs, method="L-BFGS-B", jac=True, options=options)
        for s in np.atleast_2d(starts)
    ]
    a, b, e, alpha, beta = (float(x) for x in min(found, key=lambda result: result.fun).x)
    with np.errstate(over="ignore"):
        return {"E": float(np.exp(e)), "A": float(np.exp(a)), "B": float(np.exp(b)), "alpha": alpha, "beta": beta}


def fit_single_start(n: ArrayLike, d: ArrayLike, loss: ArrayLike) -> dict[str, float]:
    """L-BFGS-B from one usual start, scipy's tolerances."""
    return fit(SINGLE_START, n, d, loss)


def fit_grid_start(n: ArrayLike, d: ArrayLike, loss: ArrayLike) -> dict[str, float]:
    """L-BFGS-B from the best of 4,500 starts, scipy's tolerances."""
    return fit(best_of_grid(np.log(n), np.log(d), np.log(loss)), n, d, loss)


def fit_many_starts(n: ArrayLike, d: ArrayLike, loss: ArrayLike) -> dict[str, float]:
    """L-BFGS-B from the best 10 of 4,500 starts, to convergence."""
    return fit(best_of_grid(np.log(n), np.log(d), np.log(loss), 10), n, d, loss, tight=True)


def predict(parameters: dict[str, float], n: ArrayLike, d: ArrayLike) -> Floats:
    """E + A/N^α + B/D^β."""
    p = parameters
    out: Floats = p["E"] + p["A"] * np.asarray(n, float) ** -p["alpha"] + p["B"] * np.asarray(d, float) ** -p["beta"]
    return out
