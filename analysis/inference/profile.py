"""Profile intervals: how far a parameter may move, the others following, before the fit is significantly worse.

With F_j(v) the least objective with parameter j held at v, the interval is where
    t(v)² = 2·(F_j(v) − F_min)/λ_j ≤ t²,  λ_j = (H⁻¹·K·H⁻¹)_jj/(H⁻¹)_jj,
    H = Σ ψ′_i·j_i·j_iᵀ,  K = Σ (ψ_i/(1 − h_i))²·j_i·j_iᵀ,  h_i = ψ′_i·j_iᵀ·H⁻¹·j_i
with j_i the gradient of residual i, h_i its leverage (MacKinnon & White 1985, J. Econometrics 29:305) and t Student's
quantile with n − p degrees of freedom (χ²₁'s root as n grows): the likelihood ratio of an M-estimate, whose λ_j makes it
hold where noise differs between runs (Kent 1982, Biometrika 69:19). With noise alike λ_j is, leverage apart,
mean ψ²/mean ψ′ (Schrader & Hettmansperger 1980, Biometrika 67:93); with squared residuals, their variance.
It follows the curve of the objective where a bootstrap of few runs, or a standard error, cannot: a side on which the
objective never rises is open, and the parameter is not identified there. Runs count as independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.inference.points import Points
from analysis.inference.solver import HUBER, Robust, solve_held
from analysis.inference.uncertainty import t_quantile
from analysis.laws.law import Floats, Law
from scaling.errors import InputError, unknown

Interval = tuple[float | None, float | None]
"""Lower and upper end; None where it is open."""

_REACH = 1e6
"""Factor (or multiple of a standard error) beyond which a side is open."""
_TOLERANCE = 0.01
"""Relative error of t(v) at which an end is found."""
_TRIES = 24
_MOST_LEVERAGE = 0.9
"""Of one run on its own residual: above, the rest say nothing of it."""


def profile_intervals(
    law: Law,
    data: Points,
    values: Floats,
    robust: Robust = HUBER,
    names: Sequence[str] | None = None,
    level: float = 0.95,
) -> dict[str, Interval]:
    """The profile interval of each parameter.

    Args:
        values: (p,) the fit of all the runs under `robust`, unweighted.
        names: which of law.free; all when None.
    Returns:
        (low, high) by name, in the parameter's units; None for a side on which the objective stays below its bound to
        the end of the parameter's domain.
    Raises:
        InputError: a name that is no free parameter; no more runs than parameters.
    """
    for name in names or ():
        if name not in law.free:
            raise unknown(f"parameter of the law {law.name!r}", name, law.free)
    if len(data) <= len(law.free):
        raise InputError(
            f"{len(data)} runs for the {len(law.free)} parameters of {law.name!r}: profile intervals need more runs than "
            "parameters, so that the residuals say how large noise is"
        )
    bound = t_quantile(level, len(data) - len(law.free))
    wanted = law.free if names is None else names
    return {name: _Profile(law, data, values, robust, name).interval(bound) for name in wanted}


def _smoothed_slope(r: Floats, robust: Robust) -> Floats:
    """ψ′ at each residual, as a density sees it: 1 within ±δ, convolved with a normal kernel.

    Its width .9·σ·n^(−1/5), σ = 1.4826·median |r| (Silverman 1986), counts enough runs where δ is far below the noise.
    """
    from scipy.special import ndtr

    width = max(0.9 * 1.4826 * float(np.median(np.abs(r))) * len(r) ** -0.2, 1e-12)
    inside = ndtr((robust.delta - r) / width) - ndtr((-robust.delta - r) / width)
    return robust.weigh(r, np.asarray(inside))


class _Profile:
    """The objective along one parameter, in u = ln v where v is positive by its domain, else u = v."""

    def __init__(self, law: Law, data: Points, values: Floats, robust: Robust, name: str) -> None:
        self.law, self.data, self.robust = law, data, robust
        self.values, self.index = np.array(values, float), law.free.index(name)
        self.domain = law.domain[self.index]
        at = float(values[self.index])
        self.log = at > 0 and self.domain.low >= 0
        self.centre = np.log(at) if self.log else at
        self.scale, error = self._curvature()
        self.error = min(error / at, np.log(4)) if self.log else error
        reach = np.log(_REACH) if self.log else _REACH * self.error
        with np.errstate(divide="ignore"):
            ends = [np.log(e) if self.log else e for e in (self.domain.low, self.domain.high)]
        self.room = np.array([min(self.centre - ends[0], reach), min(ends[1] - self.centre, reach)])
        self.least = self._minimum(self.values[None])[1][0]

    def _curvature(self) -> tuple[float, float]:
        """λ_j, and √(H⁻¹KH⁻¹)_jj, the standard error, with which the search of the ends begins.

        In the model's coordinates x, where H is well conditioned: _jj is then gᵀ(…)g with g = ∂(parameter j)/∂x.
        """
        model = self.law.bind(self.data.columns)
        x = model.inward(self.values)
        at = model.evaluate(x[None])
        y, jac, loss = at.y[0], at.jacobian[0], self.data.loss
        if self.law.log_residual:
            r, jac = np.log(y / loss), jac / y
        else:
            r = y - loss
        moves = np.diag(1e-6 * np.maximum(np.abs(x), 1e-3))
        ends = model.outward(np.stack([x - moves, x + moves]))[..., self.index]
        unit = 1 / np.sqrt(np.maximum((jac**2).sum(1), 1e-300))
        g = (ends[1] - ends[0]) / (2 * np.diag(moves)) * unit
        jac = jac * unit[:, None]
        psi = self.robust.weigh(r, np.ones(len(r))) * np.clip(r, -self.robust.delta, self.robust.delta)
        slope = _smoothed_slope(r, self.robust)
        inverse = np.linalg.pinv((jac * slope) @ jac.T, hermitian=True)
        leverage = slope * np.einsum("pn,pq,qn->n", jac, inverse, jac)
        row = inverse @ g
        left_out = psi / (1 - np.minimum(leverage, _MOST_LEVERAGE))
        variance = float(((row @ jac * left_out) ** 2).sum())
        own = float(g @ row)
        return max(variance / own if own > 0 else np.inf, 1e-28), max(float(np.sqrt(variance)), 1e-9)

    def _minimum(self, starts: Floats) -> tuple[Floats, Floats]:
        found = solve_held(self.law, self.data.columns, self.data.loss, starts, self.index, self.robust)
        return found.values, found.objective

    def interval(self, bound: float) -> Interval:
        """Where t(v) = bound on either side: the step grows until t passes it, then regula falsi (Illinois)."""
        sign = np.array([-1.0, 1.0])
        near, near_t = np.zeros(2), np.zeros(2) - bound  # distance in u, t − bound
        far, far_t = self.room.copy(), np.full(2, np.nan)
        start = np.repeat(self.values[None], 2, 0)
        distance = np.minimum(bound * self.error, self.room)
        end = np.where(self.room > 0, np.nan, np.inf)
        for _ in range(_TRIES):
            todo = np.flatnonzero(np.isnan(end))
            if not len(todo):
                break
            u = self.centre + sign[todo] * distance[todo]
            trial = start[todo]
            trial[:, self.index] = np.clip(np.exp(u) if self.log else u, self.domain.low, self.domain.high)
            values, f = self._minimum(trial)
            t = np.sqrt(np.maximum(2 * (f - self.least) / self.scale, 0.0)) - bound
            for side, value, excess in zip(todo, values, t, strict=True):
                d = distance[side]
                if abs(excess) <= _TOLERANCE * bound:
                    end[side] = d
                elif excess > 0:
                    near_t[side] *= 0.5 if far_t[side] > 0 and d < far[side] else 1.0
                    far[side], far_t[side] = d, excess
                elif d >= self.room[side]:
                    end[side] = np.inf
                else:
                    near[side], near_t[side], start[side] = d, excess, value
                if np.isnan(far_t[side]):
                    growth = np.clip(1.05 * bound / max(excess + bound, 1e-9), 1.2, 4.0)
                    distance[side] = min(d * growth, self.room[side])
                else:
                    share = -near_t[side] / (min(far_t[side], 4 * bound) - near_t[side])
                    distance[side] = near[side] + np.clip(share, 0.05, 0.95) * (far[side] - near[side])
        end = np.where(np.isnan(end), np.where(np.isnan(far_t), np.inf, distance), end)
        u = self.centre + sign * end
        low, high = (float(np.exp(v) if self.log else v) if np.isfinite(v) else None for v in u)
        return low, high
