"""One solver behind every fit and bootstrap: variable projection for starts, then batched damped Newton.

Objective of one problem, weights w (bootstrap counts), r_i = ln L̂_i − ln L_i:
    F(c, θ) = Σ_i w_i · Huber_δ(r_i),  Huber_δ(r) = r²/2 if |r| ≤ δ else δ(|r| − δ/2)
summed, never averaged (an averaged objective meets an absolute tolerance long before its minimum; Besiroglu et al. 2024,
arXiv 2404.10102). The starts eliminate the coefficients exactly (non-negative least squares of relative errors at each
point of a grid of exponents; Golub & Pereyra 1973). The polish is projected Levenberg–Marquardt with the exact Hessian,
all problems at once, δ lowered in stages so that the nearly absolute loss is met from a smooth one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from analysis.laws.surface import EXPONENT_RANGE, Floats, SurfaceLaw

HUBER_DELTA = 1e-3
_GRID_POINTS = {1: 48, 2: 14}
_STARTS = 8
_CHUNK = 50_000
_ITERATIONS = 60
_RESAMPLE_TOLERANCE = 1e-7
"""First-order decrease over F at which a resample's refit stops: far below the spread between resamples."""


@dataclass(frozen=True)
class Solution:
    """Minima of R problems."""

    values: Floats
    """(R, p): coefficients, then exponents."""
    objective: Floats
    """(R,): F at the minimum."""
    converged: np.ndarray
    """(R,) bool: whether the last step was below the tolerance."""
    starts_agreeing: int
    """How many of the starts reached the best minimum (1 for warm-started problems)."""


def solve(law: SurfaceLaw, x: Floats, loss: Floats, delta: float = HUBER_DELTA) -> Solution:
    """Fit a law to n runs from many starts.

    Args:
        x: (n, 3) natural logs of N, D, C.
        loss: (n,) positive.
        delta: Huber's threshold on the log residual.
    """
    problem = _Problem(law, x, loss)
    starts = problem.starts(np.ones(len(loss)), _STARTS, delta)
    p, f, done = problem.minimise(starts, np.ones((1, len(loss))), _stages(delta, problem.spread))
    best = int(np.argmin(f))
    agreeing = int(np.sum(f <= f[best] * (1 + 1e-6) + 1e-15))
    return Solution(problem.uncentred(p[[best]]), f[[best]], done[[best]], agreeing)


def resolve(
    law: SurfaceLaw, x: Floats, loss: Floats, start: Floats, weights: Floats, delta: float = HUBER_DELTA
) -> Solution:
    """Refit under each row of `weights` (R, n), from `start` (p,), the fit of the whole: the bootstrap."""
    problem = _Problem(law, x, loss)
    p0 = problem.centred(start)
    parts = []
    size = max(1, _CHUNK // len(loss))
    for i in range(0, len(weights), size):
        w = weights[i : i + size]
        start_points = np.repeat(p0[None], len(w), 0)
        parts.append(problem.minimise(start_points, w, (10 * delta, delta), _RESAMPLE_TOLERANCE))
    p, f, done = (np.concatenate(a) for a in zip(*parts, strict=True))
    return Solution(problem.uncentred(p), f, done, 1)


def _stages(delta: float, spread: float) -> tuple[float, ...]:
    """δ of the stages: from the spread of the losses down to δ by factors of about 4."""
    count = max(1, int(np.ceil(np.log(max(spread, delta) / delta) / np.log(4))))
    return tuple(np.geomspace(max(spread, delta), delta, count + 1))


def huber(r: Floats, delta: float) -> Floats:
    """Huber's loss of the residuals."""
    a = np.abs(r)
    return np.where(a <= delta, 0.5 * r * r, delta * (a - 0.5 * delta))


class _Problem:
    """A law and its data, log variables centred, so that a coefficient is its term's loss at the centre of the runs."""

    def __init__(self, law: SurfaceLaw, x: Floats, loss: Floats) -> None:
        self.k, self.m = len(law.terms), len(law.exponents)
        design = law.design()
        self.centre = np.einsum("kmv,v->km", design, x.mean(0))
        self.z = np.ascontiguousarray(np.einsum("kmv,nv->kmn", design, x)) - self.centre[:, :, None]
        self.log_loss = np.log(loss)
        self.spread = float(np.std(self.log_loss))
        self.lower = np.array([0.0] * self.k + [EXPONENT_RANGE[0]] * self.m)
        self.upper = np.array([np.inf] * self.k + [EXPONENT_RANGE[1]] * self.m)

    def centred(self, p: Floats) -> Floats:
        scale = np.exp(-(p[..., None, self.k :] * self.centre).sum(-1))
        return np.concatenate([p[..., : self.k] * scale, p[..., self.k :]], axis=-1)

    def uncentred(self, p: Floats) -> Floats:
        scale = np.exp((p[..., None, self.k :] * self.centre).sum(-1))
        return np.concatenate([p[..., : self.k] * scale, p[..., self.k :]], axis=-1)

    def starts(self, weights: Floats, count: int, delta: float) -> Floats:
        """The best `count` points of a grid of exponents, coefficients projected out: (count, p)."""
        points = _GRID_POINTS.get(self.m, 7)
        axis = np.geomspace(0.04, 1.6, points)
        grid = np.array(list(itertools.product(axis, repeat=self.m)))
        found = []
        size = max(1, _CHUNK // len(self.log_loss))
        for i in range(0, len(grid), size):
            theta = grid[i : i + size]
            phi = np.exp(-np.einsum("bm,kmn->bkn", theta, self.z))
            c = _project(phi / np.exp(self.log_loss), weights)
            with np.errstate(divide="ignore"):
                r = np.log(np.einsum("bk,bkn->bn", c, phi)) - self.log_loss
            found.append(np.column_stack([(weights * huber(r, 10 * delta)).sum(1), c, theta]))
        table = np.concatenate(found)
        return table[np.argsort(table[:, 0], kind="stable")[:count], 1:]

    def evaluate(self, p: Floats, w: Floats, delta: float) -> tuple[Floats, Floats, Floats, Floats]:
        """F (B,), gradient (B, p), Hessian (B, p, p) and a positive scale of each parameter (B, p)."""
        c, theta = p[:, : self.k], p[:, self.k :]
        phi = np.exp(-np.tensordot(theta, self.z, axes=([1], [1])))  # (B, k, n)
        y = np.maximum(np.matmul(c[:, None, :], phi), 1e-30)  # a trial step may put every coefficient at 0
        phi /= y  # from here: φ/ŷ
        r = np.log(y[:, 0]) - self.log_loss
        share = c[:, :, None] * phi
        slope = -np.einsum("bkn,kmn->bmn", share, self.z)
        jac = np.concatenate([phi, slope], axis=1)  # ∂r/∂p: (B, p, n)
        clipped = np.clip(r, -delta, delta)
        psi = w * clipped
        inside = w * (np.abs(r) <= delta)
        f = (w * np.where(inside > 0, 0.5 * r * r, delta * (np.abs(r) - 0.5 * delta))).sum(1)
        g = np.matmul(jac, psi[:, :, None])[:, :, 0]
        h = np.matmul(jac * (inside - psi)[:, None, :], jac.transpose(0, 2, 1))
        for k in range(self.k):  # second derivatives of ŷ over ŷ, weighted by ψ
            zk = self.z[k]
            moved = psi * phi[:, k]
            cross = -moved @ zk.T
            h[:, k, self.k :] += cross
            h[:, self.k :, k] += cross
            for i in range(self.m):
                h[:, self.k + i, self.k :] += c[:, k, None] * ((moved * zk[i]) @ zk.T)
        with np.errstate(divide="ignore", invalid="ignore"):
            irls = np.where(np.abs(r) > delta, w * delta / np.abs(r), w)
        scale = np.einsum("bpn,bn->bp", jac * jac, irls)
        return f, g, h, scale + 1e-12

    def minimise(
        self, start: Floats, w: Floats, stages: tuple[float, ...], tolerance: float = 1e-14
    ) -> tuple[Floats, Floats, np.ndarray]:
        """Projected Levenberg–Marquardt from each start (B, p): parameters, F and convergence at the last stage."""
        p = np.clip(start, self.lower, self.upper)
        w = np.broadcast_to(w, (len(p), len(self.log_loss)))
        done = np.zeros(len(p), bool)
        f = np.full(len(p), np.inf)
        for stage, delta in enumerate(stages):
            last = stage == len(stages) - 1
            p, f, done = self._descend(p, w, delta, _ITERATIONS if last else 6, tolerance if last else 1e-4)
        return p, f, done

    def _descend(
        self, p: Floats, w: Floats, delta: float, iterations: int, tolerance: float
    ) -> tuple[Floats, Floats, np.ndarray]:
        p = p.copy()
        out_f = np.full(len(p), np.inf)
        done = np.zeros(len(p), bool)
        active = np.arange(len(p))
        state = self.evaluate(p, w, delta)
        damping = np.full(len(p), 1e-3)
        for _ in range(iterations):
            f, g, h, scale = state
            x = p[active]
            blocked = ((x <= self.lower) & (g > 0)) | ((x >= self.upper) & (g < 0))
            step = _damped_step(g, h, scale, damping, blocked)
            gain = -np.einsum("bp,bp->b", g, step)  # first-order decrease, twice a Newton step's
            trial = np.clip(x + step, self.lower, self.upper)
            new = self.evaluate(trial, w[active], delta)
            better = new[0] <= f
            small = (np.abs(gain) <= tolerance * (f + 1e-300)) & (better | (damping > 1e6))
            stuck = damping > 1e12
            p[active[better]] = trial[better]
            state = _select(better, new, state)
            damping = np.where(better, damping * 0.1, damping * 8).clip(1e-12)
            out_f[active] = state[0]
            finished = small | stuck
            done[active[finished]] = True
            if finished.all():
                break
            keep = ~finished
            active, damping = active[keep], damping[keep]
            state = (state[0][keep], state[1][keep], state[2][keep], state[3][keep])
        return p, out_f, done


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


def _project(a: Floats, weights: Floats) -> Floats:
    """argmin_{c ≥ 0} Σ_n w_n (Σ_k c_k a_kn − 1)² for each of B bases (B, k, n), by trying every subset of terms."""
    k = a.shape[1]
    gram = np.matmul(a * weights, a.transpose(0, 2, 1))
    rhs = np.matmul(a, weights)
    best_c, best = np.zeros((len(a), k)), np.full(len(a), np.inf)
    for size in range(1, k + 1):
        for subset in itertools.combinations(range(k), size):
            s = list(subset)
            g = gram[:, s][:, :, s]
            g = g + np.eye(size) * (1e-12 * np.trace(g, axis1=1, axis2=2))[:, None, None]
            c = np.linalg.solve(g, rhs[:, s, None])[:, :, 0]
            value = -np.einsum("bs,bs->b", c, rhs[:, s])  # least squares at its minimum, up to Σw
            take = (c >= 0).all(1) & (value < best)
            best = np.where(take, value, best)
            full = np.zeros((len(a), k))
            full[:, s] = c
            best_c = np.where(take[:, None], full, best_c)
    return best_c
