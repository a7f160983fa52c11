"""One solver behind every fit and bootstrap: variable projection for starts, then batched damped Newton.

Objective of one problem, weights w (bootstrap counts), r_i = ln L̂_i − ln L_i:
    F(c, θ) = Σ_i w_i · ρ(r_i),  Huber: ρ(r) = r²/2 if |r| ≤ δ else δ(|r| − δ/2)
summed, never averaged (an averaged objective meets an absolute tolerance long before its minimum; Besiroglu et al. 2024,
arXiv 2404.10102). The starts eliminate the linear parameters exactly (non-negative least squares of relative errors at
each of many points of the others; Golub & Pereyra 1973). The polish is projected Levenberg–Marquardt, all problems at
once, with the exact Hessian where the law gives its curvature and Gauss–Newton's where it does not; δ is lowered in
stages, so that a nearly absolute loss is met from a smooth one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.laws.law import Columns, Floats, Law, Model
from analysis.laws.surface import get_law
from scaling.errors import unknown


@dataclass(frozen=True)
class Robust:
    """The loss of a residual r = ln(predicted / actual): Huber's, with another weight where a run is worse than the law."""

    name: str
    delta: float
    """Up to here quadratic, beyond linear."""
    above: float = 1.0
    """Weight of residuals of runs above the law (r < 0): less than 1 where runs may be mis-tuned, which only raises loss."""

    def weigh(self, r: Floats, w: Floats) -> Floats:
        """Weights with the asymmetry."""
        return w if self.above == 1.0 else np.where(r < 0, self.above * w, w)


ROBUST: dict[str, Robust] = {
    r.name: r
    for r in (
        Robust("huber", 1e-3),
        Robust("squared", np.inf),
        Robust("absolute", 1e-6),
        Robust("asymmetric", 1e-3, above=0.25),
    )
}
"""Losses by name. huber: the field's (δ = 1e-3 on ln loss); absolute: Huber's with δ = 1e-6."""
HUBER = ROBUST["huber"]
HUBER_DELTA = HUBER.delta

_SEARCH = 196
_SEARCH_ROWS = 4_000
_CHUNK = 60_000
_ITERATIONS = 60
_LAST_STARTS, _LAST_ITERATIONS = 3, 400
"""Starts that the iterations above left short of a minimum: how many, the best, go on, and for how long."""
_STILL = 2e-16
"""Step over parameter below which nothing moves."""
_EXACT, _NOTHING = 1e-28, 1e-20
"""F over the sum of weights at which residuals are of machine precision, and at which a fit has nothing left to explain."""
_RESAMPLE_TOLERANCE = 1e-7
"""First-order decrease over F at which a resample's refit stops: far below the spread between resamples."""
_OVERFLOWING = np.errstate(over="ignore", invalid="ignore", divide="ignore")
"""For what tries points that may be far off: a loss that is not finite is not taken."""


def get_robust(name: str) -> Robust:
    """The loss of that name.

    Raises:
        InputError: no such loss; lists all.
    """
    if name not in ROBUST:
        raise unknown("loss", name, ROBUST)
    return ROBUST[name]


@dataclass(frozen=True)
class Solution:
    """Minima of R problems."""

    values: Floats
    """(R, p): the law's free parameters."""
    objective: Floats
    """(R,): F at the minimum."""
    converged: np.ndarray
    """(R,) bool: whether the last step was below the tolerance."""
    starts: int = 1
    """How many starts there were."""
    starts_agreeing: int = 1
    """How many of them reached the best minimum."""
    condition: float = np.nan
    """Condition number of the first problem's Hessian in the solver's coordinates, parameters scaled to equal curvature."""


def solve(
    law: Law, columns: Columns, loss: Floats, robust: Robust = HUBER, weights: Floats | None = None
) -> Solution:
    """Fit a law to n runs from many starts.

    Args:
        columns: the law's variables, (n,) each.
        loss: (n,) what it predicts.
        weights: (n,) of the runs; 1 when None.
    """
    w = np.ones(len(loss)) if weights is None else np.asarray(weights, float)
    problem = _Problem(law, columns, loss)
    if len(loss) > _SEARCH_ROWS:  # starts from a sample, the minimum from all
        rows = np.random.default_rng(0).choice(len(loss), _SEARCH_ROWS, replace=False)
        few = solve(law, {k: v[rows] for k, v in columns.items()}, loss[rows], robust, w[rows])
        p, f, done = problem.minimise(problem.model.inward(few.values), w[None], (robust,))
        return Solution(
            problem.model.outward(p), f, done, few.starts, few.starts_agreeing, problem.condition(p, w, robust)
        )
    starts = problem.starts(w, robust)
    if law.nested is not None:
        name, extra = law.nested
        inner = get_law(name)
        within = {**inner.parameters(solve(inner, columns, loss, robust, w).values[0]), **dict(extra)}
        starts = np.vstack([starts, problem.model.inward(law.values(within)[None])])
    p, f, done = problem.minimise(starts, w[None], _stages(robust, problem.spread))
    late = np.argsort(f, kind="stable")[:_LAST_STARTS]
    late = late[~done[late]]
    if len(late):
        p[late], f[late], done[late] = problem.minimise(p[late], w[None], (robust,), iterations=_LAST_ITERATIONS)
    best = int(np.argmin(f))
    agreeing = int(np.sum(f <= f[best] * (1 + 1e-6) + 1e-15))
    found = problem.model.outward(p[[best]])
    return Solution(found, f[[best]], done[[best]], len(starts), agreeing, problem.condition(p[[best]], w, robust))


def resolve(
    law: Law, columns: Columns, loss: Floats, start: Floats, weights: Floats, robust: Robust = HUBER
) -> Solution:
    """Refit under each row of `weights` (R, n), from `start` (p,), the fit of the whole: the bootstrap."""
    problem = _Problem(law, columns, loss)
    p0 = problem.model.inward(start)
    parts = []
    size = max(1, _CHUNK // len(loss))
    for i in range(0, len(weights), size):
        w = weights[i : i + size]
        parts.append(problem.minimise(np.repeat(p0[None], len(w), 0), w, (robust,), _RESAMPLE_TOLERANCE))
    p, f, done = (np.concatenate(a) for a in zip(*parts, strict=True))
    return Solution(problem.model.outward(p), f, done)


def solve_held(
    law: Law, columns: Columns, loss: Floats, starts: Floats, index: int, robust: Robust = HUBER
) -> Solution:
    """Minima over the other parameters with the one at `index` held at what each start (R, p) has there: a profile."""
    problem = _Problem(law, columns, loss, index)
    inner = problem.model.inward(starts)
    p, f, done = problem.minimise(inner, np.ones((1, len(loss))), (robust,), _RESAMPLE_TOLERANCE)
    return Solution(problem.model.outward(p), f, done)


def objective(
    law: Law, parameters: Mapping[str, float], columns: Columns, loss: Floats, robust: Robust = HUBER
) -> float:
    """F at given parameters."""
    y, _ = law.rows(law.values(parameters)[None], columns)
    r = _residual(law, y, loss)
    return float((robust.weigh(r, np.ones_like(r)) * huber(r, robust.delta)).sum())


def predictions(law: Law, values: Floats, columns: Columns) -> Floats:
    """(R, n): what R parameter vectors predict at n rows."""
    out = np.empty((len(values), len(next(iter(columns.values())))))
    model = law.bind(columns, centre=False)
    size = max(1, _CHUNK // max(out.shape[1], 1))
    for i in range(0, len(values), size):
        out[i : i + size] = model.evaluate(values[i : i + size]).y
    return out


def log_predictions(law: Law, values: Floats, columns: Columns) -> Floats:
    """(R, n): ln of what R parameter vectors predict at n rows."""
    return np.log(np.maximum(predictions(law, values, columns), 1e-300))


def _stages(robust: Robust, spread: float) -> tuple[Robust, ...]:
    """The loss with δ from the spread of the data down to its own by factors of about 4."""
    if not np.isfinite(robust.delta):
        return (robust,)
    wide = max(spread, robust.delta)
    count = max(1, int(np.ceil(np.log(wide / robust.delta) / np.log(4))))
    return tuple(Robust(robust.name, d, robust.above) for d in np.geomspace(wide, robust.delta, count + 1))


def huber(r: Floats, delta: float) -> Floats:
    """Huber's loss of the residuals."""
    a = np.abs(r)
    return np.where(a <= delta, 0.5 * r * r, delta * (a - 0.5 * delta)) if np.isfinite(delta) else 0.5 * r * r


def _residual(law: Law, y: Floats, loss: Floats) -> Floats:
    return np.log(np.maximum(y, 1e-30)) - np.log(loss) if law.log_residual else y - loss


class _Problem:
    """A law and its data."""

    def __init__(self, law: Law, columns: Columns, loss: Floats, held: int | None = None) -> None:
        model = law.bind(columns)
        self.model: Model = model if held is None else model.plain(held)
        self.held = np.arange(len(law.domain)) == held
        self.domain, self.logs, self.loss = law.domain, law.log_residual, loss
        self.target = np.log(loss) if self.logs else loss
        self.spread = float(np.std(self.target))
        self.lower = np.array([q.low for q in self.domain])
        self.upper = np.array([q.high for q in self.domain])

    @_OVERFLOWING
    def starts(self, weights: Floats, robust: Robust) -> Floats:
        """The best points of a search, linear parameters projected out: (starts, p)."""
        vectors, basis, target, precision = self.model.search(_SEARCH, self.loss)
        eliminated = self.model.eliminated
        if len(eliminated):
            root = np.sqrt(weights * precision)
            signed = np.array([self.lower[i] < 0 for i in eliminated])
            vectors[:, eliminated] = _project(basis * root[:, None], target * root, signed)
        vectors = np.clip(vectors, self.lower, self.upper)
        f = np.concatenate([self._value(part, weights, robust) for part in np.array_split(vectors, 4)])
        order = np.argsort(np.where(np.isfinite(f), f, np.inf), kind="stable")
        return vectors[order[: self.model.starts]]

    def _value(self, vectors: Floats, weights: Floats, robust: Robust) -> Floats:
        y = self.model.evaluate(vectors).y
        r = (np.log(np.maximum(y, 1e-30)) if self.logs else y) - self.target
        return (robust.weigh(r, np.broadcast_to(weights, r.shape)) * huber(r, 10 * robust.delta)).sum(1)

    def evaluate(self, p: Floats, w: Floats, robust: Robust) -> tuple[Floats, Floats, Floats, Floats]:
        """F (B,), gradient (B, p), Hessian (B, p, p) and a positive scale of each parameter (B, p)."""
        at = self.model.evaluate(p)
        delta = robust.delta
        if self.logs:
            inverse = 1 / np.maximum(at.y, 1e-30)  # a trial step may put every coefficient at 0
            r = -np.log(inverse) - self.target
            jac = at.jacobian * inverse[:, None]
        else:
            r, jac = at.y - self.target, at.jacobian
        w = robust.weigh(r, w)
        size = np.abs(r)
        if np.isfinite(delta):
            psi = w * np.clip(r, -delta, delta)
            flat = size > delta
            f = np.where(flat, w * (delta * (size - 0.5 * delta)), 0.5 * r * psi).sum(1)
            inside = np.where(flat, 0.0, w)
            irls = np.where(flat, np.abs(psi) / np.maximum(size, 1e-300), w)
        else:
            psi, inside, irls = w * r, w, w
            f = 0.5 * (r * psi).sum(1)
        g = np.matmul(jac, psi[:, :, None])[:, :, 0]
        force = psi * inverse if self.logs else psi
        second = self.model.curvature(p, at, force)
        if second is None:  # Gauss–Newton; for an absolute loss with the weights of iteratively re-weighted squares
            h = np.matmul(jac * irls[:, None, :], jac.transpose(0, 2, 1))
            scale = np.einsum("bpp->bp", h) + 1e-12
        else:
            h = np.matmul(jac * (inside - psi if self.logs else inside)[:, None, :], jac.transpose(0, 2, 1)) + second
            scale = np.matmul(np.square(jac), irls[:, :, None])[:, :, 0] + 1e-12
        return f, g, h, scale

    def condition(self, p: Floats, w: Floats, robust: Robust) -> float:
        """Condition number of Jᵀ·W·J at p (1, p), its diagonal scaled to 1, parameters at a bound left out."""
        free = np.flatnonzero((p[0] > self.lower) & (p[0] < self.upper))
        at = self.model.evaluate(p)
        jac = at.jacobian[0, free] / (at.y[0] if self.logs else 1.0)
        gram = (jac * w) @ jac.T
        unit = 1 / np.sqrt(np.maximum(np.diag(gram), 1e-300))
        return float(np.linalg.cond(gram * unit[:, None] * unit)) if len(free) else 1.0

    @_OVERFLOWING
    def minimise(
        self,
        start: Floats,
        w: Floats,
        stages: tuple[Robust, ...],
        tolerance: float = 1e-14,
        iterations: int = _ITERATIONS,
    ) -> tuple[Floats, Floats, np.ndarray]:
        """Projected Levenberg–Marquardt from each start (B, p): parameters, F and convergence at the last stage."""
        p = np.clip(start, self.lower, self.upper)
        w = np.broadcast_to(w, (len(p), len(self.loss)))
        for robust in stages[:-1]:
            p = self._descend(p, w, robust, 6, 1e-4)[0]
        return self._descend(p, w, stages[-1], iterations, tolerance)

    def _descend(
        self, p: Floats, w: Floats, robust: Robust, iterations: int, tolerance: float
    ) -> tuple[Floats, Floats, np.ndarray]:
        p = p.copy()
        out_f = np.full(len(p), np.inf)
        done = np.zeros(len(p), bool)
        active = np.arange(len(p))
        state = self.evaluate(p, w, robust)
        damping = np.full(len(p), 1e-3)
        total = w.sum(1)
        for _ in range(iterations):
            f, g, h, scale = state
            x = p[active]
            blocked = ((x <= self.lower) & (g > 0)) | ((x >= self.upper) & (g < 0)) | self.held
            step = _damped_step(g, h, scale, damping, blocked)
            gain = -np.einsum("bp,bp->b", g, step)  # first-order decrease, twice a Newton step's
            trial = np.clip(x + step, self.lower, self.upper)
            new = self.evaluate(trial, w[active], robust)
            better = (new[0] <= f) & np.isfinite(new[0]) & np.isfinite(new[2]).all((1, 2))
            small = (np.abs(gain) <= tolerance * (f + 1e-300)) & (better | (damping > 1e6))
            stuck = (damping > 1e12) | (np.abs(trial - x) <= _STILL * np.abs(x)).all(1)
            p[active[better]] = trial[better]
            state = _select(better, new, state)
            damping = np.where(better, damping * 0.1, damping * 8).clip(1e-12)
            out_f[active] = state[0]
            finished = small | stuck | (state[0] <= _EXACT * total[active])
            done[active[finished]] = True
            if finished.all():
                break
            keep = ~finished
            active, damping = active[keep], damping[keep]
            state = (state[0][keep], state[1][keep], state[2][keep], state[3][keep])
        return p, out_f, (done & np.isfinite(out_f)) | (out_f <= _NOTHING * total)


State = tuple[Floats, Floats, Floats, Floats]


def _select(take: np.ndarray, new: State, old: State) -> State:
    """`new` for the problems to take, `old` for the others."""
    f, g, h, s = (np.where(take.reshape(-1, *[1] * (a.ndim - 1)), b, a) for a, b in zip(old, new, strict=True))
    return f, g, h, s


def _damped_step(g: Floats, h: Floats, scale: Floats, damping: Floats, blocked: np.ndarray) -> Floats:
    """−(H + λ·diag(scale))⁻¹ g over the parameters that are not blocked at a bound, in units where scale = 1."""
    unit = 1 / np.sqrt(scale)
    free = ~blocked
    mask = free[:, :, None] & free[:, None, :]
    a = np.where(mask, h * unit[:, :, None] * unit[:, None, :], 0.0)
    diagonal = np.arange(g.shape[1])
    a[:, diagonal, diagonal] += np.where(free, damping[:, None] + 1e-13, 1.0)
    b = np.where(free, g * unit, 0.0)
    try:
        s = np.linalg.solve(a, b[:, :, None])[:, :, 0]
    except np.linalg.LinAlgError:  # one singular matrix of the batch: gradient steps this once
        s = b / (1 + damping[:, None])
    return -s * unit


def _project(a: Floats, target: Floats, signed: np.ndarray) -> Floats:
    """argmin_c Σ_n (Σ_k c_k a_kn − target_n)² for each of B bases (B, k, n), c_k ≥ 0 where not signed, by trying every
    subset of the terms that may be 0."""
    k = a.shape[1]
    gram = np.matmul(a, a.transpose(0, 2, 1))
    rhs = np.matmul(a, target[:, :, None])[:, :, 0]
    always = tuple(np.flatnonzero(signed))
    others = tuple(np.flatnonzero(~signed))
    best_c, best = np.zeros((len(a), k)), np.full(len(a), np.inf)
    for size in range(0 if always else 1, len(others) + 1):
        for subset in itertools.combinations(others, size):
            s = sorted((*always, *subset))
            g = gram[:, s][:, :, s]
            g = g + np.eye(len(s)) * (1e-12 * np.trace(g, axis1=1, axis2=2) + 1e-300)[:, None, None]
            c = np.linalg.solve(g, rhs[:, s, None])[:, :, 0]
            value = -np.einsum("bs,bs->b", c, rhs[:, s])  # least squares at its minimum, up to a constant
            take = ((c >= 0) | signed[s]).all(1) & (value < best)
            best = np.where(take, value, best)
            full = np.zeros((len(a), k))
            full[:, s] = c
            best_c = np.where(take[:, None], full, best_c)
    return best_c
