"""Which runs to buy next: those that lower the variance of a forecast most per cost, under every law that fits so far.

c-optimal design (Chernoff 1953), greedy: each member of the ensemble is linearised at its fit, and a run is added by a
rank-one update (Sherman & Morrison 1950) of the member's information. With g = ∂ln L/∂ln θ of a run, g₀ of the target,
w the weight that the member's fit gives a run, σ run noise, and a prior of one e-fold on every parameter:
    H = Σ w·g·gᵀ + σ²·I,   a = H⁻¹·g₀,   Var_m = σ²·aᵀ(Σ w²·g·gᵀ + σ²·I)·a
    Var = Σ_m ω_m·Var_m + B(target, target) + (τ·ln(C_target / C_largest))²
B is the covariance of the members' predictions about their mean, conditioned on each run bought (B ← B − b·bᵀ/(B_ii + σ²)):
runs where the laws disagree tell them apart. τ is the law-form error per e-fold of compute, at least its prior. This is
what `FitResult.predict_interval` is made of, less the noise of the new run itself, which no design can lower.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.decide.allocate import family_widths, flops_per_token_of
from analysis.inference import FitResult
from analysis.inference.points import Points
from analysis.inference.solver import log_predictions
from analysis.inference.uncertainty import FormError, gradients
from analysis.laws.law import Floats, complete
from scaling.accounting import PARAMS_CONVENTIONS, ParamsConvention, count_params, training_flops
from scaling.cost import run_seconds
from scaling.errors import InputError
from scaling.grid import make_run
from scaling.hardware import Device
from scaling.recipe import recipe_from_dict
from scaling.records import Plan
from scaling.spec import RunSpec

LEVEL_RATIOS = (4.0, 2.0, 2**0.5)
"""Between the compute levels of candidates, the first that gives a choice: the backtest holds out whole levels, so each
needs several runs, but a family of few widths has few cells a level."""
CHOICE = 3.0
"""Cost of all candidates over the budget that is a choice."""
MAX_SEEDS = 2
"""Runs of one cell: beyond it a neighbouring cell says as much and tests the law's form too. Without any second seed the run
noise and the law-form error of a real sweep were estimated less well, and its interval was wider (docs/log.md)."""
MOST_RUNS = 30
"""A run counts as at least 1/MOST_RUNS of the budget: what very many tiny runs say hangs on the form of the law."""
_WIDTH_STEP = 1.08
_ROUNDING = 0.02
"""Of D/N: runs are of whole batches."""
WORTHWHILE = 0.9
"""A dearer largest run is taken where it lowers the forecast's expected standard deviation to this share: a few runs that take
the whole budget reach further, but decide by themselves. On surfaces where the law is true runs half as dear gave narrower
intervals, on the demo's corpus, where its form fails over distance, wider ones (docs/log.md)."""
_PRICE_POWERS = (0.0, 0.25)
"""Gain is divided by price to these powers, and the better design is taken (Leskovec et al. 2007 compare 0 and 1). Gain per
cost itself, power 1, buys cheap runs until none is left: in simulation its intervals were wider and covered less."""


@dataclass(frozen=True)
class Candidates:
    """Runs that could be bought, m cells."""

    n: Floats
    """(m,) parameters, in the fit's convention."""
    d: Floats
    """(m,) tokens."""
    flops: Floats
    """(m,) in the fit's convention."""
    cost: Floats
    """(m,) of one run, in the unit of the budget."""
    seeds_done: np.ndarray
    """(m,) int: runs of that cell that there are."""
    specs: tuple[RunSpec, ...] = ()
    """What they are in a sweep, seeds apart; (m,) or none."""

    def __len__(self) -> int:
        return len(self.n)


@dataclass(frozen=True)
class Design:
    """Runs to buy."""

    seeds: np.ndarray
    """(m,) int: new runs of each candidate."""
    sd_before: float
    """Standard deviation of ln of the forecast loss on the runs so far, the noise of the new run not in it."""
    sd_after: float
    """The same, expected with the new runs."""

    def cheapest(self, candidates: Candidates, spend: float) -> np.ndarray:
        """(m,) int: the design's runs in ascending cost while `spend` lasts: they decide about the dear ones."""
        taken = np.zeros_like(self.seeds)
        for i in np.argsort(candidates.cost, kind="stable"):
            taken[i] = min(self.seeds[i], int(spend / candidates.cost[i] * (1 + 1e-9)))
            spend -= taken[i] * candidates.cost[i]
            if taken[i] < self.seeds[i]:
                break
        return taken


def choose_runs(
    fit: FitResult, data: Points, candidates: Candidates, target: tuple[float, float], budget: float
) -> Design:
    """Buy runs while the budget lasts, each time the one that lowers the forecast's variance most for its price.

    Args:
        data: the runs that `fit` was fitted on.
        target: N and D of the run to forecast.
        budget: in the unit of the candidates' cost.
    Raises:
        InputError: no candidate, or none that the budget pays.
    """
    if not (candidates.cost <= budget).any():
        least = f"the cheapest costs {candidates.cost.min():.3g}" if len(candidates) else "none is within the limits"
        raise InputError(
            f"budget {budget:.3g} buys none of {len(candidates)} candidate runs ({least}): raise the budget"
        )
    start = _State(fit, data, candidates, target)
    designs = [_greedy(start.copy(), candidates, budget, power) for power in _PRICE_POWERS]
    return min(designs, key=lambda design: design.sd_after)


def choose_largest(
    fit: FitResult, data: Points, sets: Sequence[Candidates], target: tuple[float, float], budget: float
) -> tuple[Design, Candidates]:
    """`choose_runs` from each set of candidates, in ascending order of their largest run; a later one must be WORTHWHILE.

    Raises:
        InputError: as `choose_runs`, where no set has a run that the budget pays.
    """
    able = [c for c in sets if (c.cost <= budget).any()] or sets[:1]
    designs = [(choose_runs(fit, data, c, target, budget), c) for c in able]
    best = designs[0]
    for other in designs[1:]:
        if other[0].sd_after < WORTHWHILE * best[0].sd_after:
            best = other
    return best


def _greedy(state: _State, candidates: Candidates, budget: float, power: float) -> Design:
    before = state.variance()
    seeds = np.zeros(len(candidates), int)
    price = np.maximum(candidates.cost, budget / MOST_RUNS) ** power
    while True:
        buyable = (candidates.cost <= budget) & (candidates.seeds_done + seeds < MAX_SEEDS)
        if not buyable.any():
            return Design(seeds, float(np.sqrt(before)), float(np.sqrt(state.variance())))
        gain = (state.variance() - state.variance_with()) / price
        best = int(np.argmax(np.where(buyable, gain, -np.inf)))
        state.add(best)
        seeds[best] += 1
        budget -= float(candidates.cost[best])


class _Information:
    """What the runs so far say to one member about the target, and what a candidate would add."""

    def __init__(self, runs: Floats, new: Floats, target: Floats, w: Floats, w_new: Floats, noise: float) -> None:
        """runs (n, p), new (m, p), target (p,): gradients of ln L by ln θ; w (n,), w_new (m,): weights in the fit."""
        ridge = noise**2 * np.eye(len(target))
        self.g, self.w, self.noise = new, w_new, noise
        self.inverse = np.linalg.inv((runs * w[:, None]).T @ runs + ridge)
        self.scatter = (runs * w[:, None] ** 2).T @ runs + ridge
        self.a = self.inverse @ target

    def variance(self) -> float:
        return float(self.noise**2 * self.a @ self.scatter @ self.a)

    def variance_with(self) -> Floats:
        """(m,) after one run of each candidate."""
        u = self.g @ self.inverse
        step = self.w * (self.g @ self.a) / (1 + self.w * np.einsum("mp,mp->m", u, self.g))
        a = self.a - u * step[:, None]
        own = self.w * np.einsum("mp,mp->m", self.g, a)
        return np.asarray(self.noise**2 * (np.einsum("mp,pq,mq->m", a, self.scatter, a) + own**2))

    def add(self, i: int) -> None:
        g, w = self.g[i], self.w[i]
        u = self.inverse @ g
        scale = w / (1 + w * (g @ u))
        self.a = self.a - u * (scale * (g @ self.a))
        self.inverse = self.inverse - scale * np.outer(u, u)
        self.scatter = self.scatter + w**2 * np.outer(g, g)


class _State:
    """The variance of the forecast with the runs chosen so far."""

    def __init__(self, fit: FitResult, data: Points, candidates: Candidates, target: tuple[float, float]) -> None:
        m, noise = len(candidates), fit.run_noise
        n, d = np.append(candidates.n, target[0]), np.append(candidates.d, target[1])
        flops = np.append(candidates.flops, 6 * fit.flops_ratio * target[0] * target[1])
        new = complete({"n_params": n, "n_tokens": d, "flops": flops})
        columns = {k: np.concatenate([data.columns[k], new[k]]) for k in new}
        index = np.arange(len(data) + m + 1)
        every = Points(columns, np.concatenate([data.loss, fit.predict(n, d)]), index, tuple(map(str, index)))
        bought = every.take(index[:-1])  # the target is not a run that a member's weights could refer to
        self.shares = [f.weight for f in fit.ensemble.members]
        self.members = []
        for f in fit.ensemble.members:
            g, w = gradients(f.member.form, f.values, columns), f.member.weights(bought)
            w = w / w[: len(data)].max()
            self.members.append(
                _Information(g[: len(data)], g[len(data) : -1], g[-1], w[: len(data)], w[len(data) :], noise)
            )
        each = np.stack([log_predictions(f.member.form, f.values[None], new)[0] for f in fit.ensemble.members])
        apart = each - np.array(self.shares) @ each
        self.between = (apart.T * self.shares) @ apart
        self.noise = noise
        self.form = FormError(max(fit.form.per_efold, FormError.PRIOR), fit.form.freedom)
        self.log_flops, self.target = np.log(flops[:-1]), float(np.log(flops[-1]))
        self.largest = float(np.log(fit.largest_flops))

    def copy(self) -> _State:
        other = copy.copy(self)
        other.members = [copy.copy(m) for m in self.members]
        return other

    def variance(self) -> float:
        within = sum(w * m.variance() for w, m in zip(self.shares, self.members, strict=True))
        return float(within + self.between[-1, -1] + self.form.sd(self.target - self.largest) ** 2)

    def variance_with(self) -> Floats:
        """(m,) after one run of each candidate."""
        within = sum(w * m.variance_with() for w, m in zip(self.shares, self.members, strict=True))
        b = self.between
        between = b[-1, -1] - b[-1, :-1] ** 2 / (np.diag(b)[:-1] + self.noise**2)
        form = self.form.sd(self.target - np.maximum(self.largest, self.log_flops))
        return np.asarray(within + between + form**2)

    def add(self, i: int) -> None:
        for m in self.members:
            m.add(i)
        b = self.between
        self.between = b - np.outer(b[i], b[i]) / (b[i, i] + self.noise**2)
        self.largest = max(self.largest, float(self.log_flops[i]))


def levels(largest: float, smallest: float, ratio: float = LEVEL_RATIOS[0]) -> Floats:
    """Compute levels of candidates, from `largest` down by `ratio` to `smallest`."""
    count = int(np.log(max(largest / smallest, 1.0)) / np.log(ratio) + 1e-9) + 1
    return np.asarray(largest / ratio ** np.arange(count))


def family_candidates(
    fit: FitResult, plan: Plan, data: Points, budget: float, largest_flops: float, device: Device | None = None
) -> Candidates:
    """The family's widths at each compute level, with the plan's recipe, where D/N is within the runs' own range and the
    corpus lasts.

    Args:
        data: the runs so far: their least compute bounds the levels, their D/N the candidates.
        budget: exact FLOPs, or hours of `device`.
        largest_flops: exact FLOPs of the highest level.
        device: cost in hours of it; in exact FLOPs when None.
    """
    for ratio in LEVEL_RATIOS:
        found = _at_levels(fit, plan, data, levels(largest_flops, float(np.exp(data.log_flops.min())), ratio), device)
        spare = np.maximum(MAX_SEEDS - found.seeds_done, 0)
        if spare @ np.where(found.cost <= budget, found.cost, 0.0) >= CHOICE * budget:
            break
    return found


def _at_levels(fit: FitResult, plan: Plan, data: Points, flops: Floats, device: Device | None) -> Candidates:
    params = _params(fit.convention["params"])
    ratio = data.columns["n_tokens"] / data.columns["n_params"]
    low, high = ratio.min() * (1 - _ROUNDING), ratio.max() * (1 + _ROUNDING)
    done = Counter((run.shape, run.tokens) for run in plan.runs)
    specs = []
    for width in _thinned(family_widths(plan.family)):
        at = [spec for c in flops if (spec := make_like(plan, width, float(c))) is not None]
        inside = [s for s in at if low <= s.tokens / s.params.count(params) <= high]
        specs += [s for s in inside if s.tokens <= s.data.max_epochs * plan.data.train_tokens]
        if all(s.tokens / s.params.count(params) < low for s in at):
            break
    c = fit.convention["flops"]
    return Candidates(
        n=np.array([s.params.count(params) for s in specs], float),
        d=np.array([s.tokens for s in specs], float),
        flops=np.array([training_flops(s.shape, s.tokens, c, params) for s in specs], float),  # type: ignore[arg-type]
        cost=np.array([s.flops if device is None else run_seconds(s, device) / 3600 for s in specs], float),
        seeds_done=np.array([done[s.shape, s.tokens] for s in specs], int),
        specs=tuple(specs),
    )


def make_like(plan: Plan, width: int, flops: float) -> RunSpec | None:
    """The run of this width and budget, as the plan's sweep would plan it; None when it is less than one batch."""
    like = plan.runs[0]
    same = {f: getattr(like, f) for f in ("data", "optim", "schedule", "eval", "precision", "divergence_factor")}
    try:
        return make_run(plan.family, width, flops=flops, recipe=recipe_from_dict(plan.recipe), **same)
    except InputError:
        return None


def _thinned(widths: np.ndarray) -> list[int]:
    """Widths with steps of at least _WIDTH_STEP."""
    out: list[int] = []
    for width in widths:
        if not out or width >= out[-1] * _WIDTH_STEP:
            out.append(int(width))
    return out


def _params(name: str) -> ParamsConvention:
    if name not in PARAMS_CONVENTIONS:
        raise InputError(f"runs counted as {name!r} have no shapes: choose runs for a sweep directory")
    return name


def aim(fit: FitResult, plan: Plan | None, data: Points, target_flops: float) -> tuple[float, float]:
    """N and D of the run to forecast: the optimum of the fit; where it has none yet, at the runs' mean D/N."""
    try:
        return fit.allocate(target_flops, flops_per_token_of(fit, plan.family if plan else None))
    except InputError:
        ratio = float(np.exp(np.mean(data.x[:, 1] - data.x[:, 0])))
        pairs = target_flops / (6 * fit.flops_ratio)
        return float(np.sqrt(pairs / ratio)), float(np.sqrt(pairs * ratio))


def recentred_widths(fit: FitResult, plan: Plan, flops: float, own: Sequence[int]) -> list[int]:
    """The widths of an IsoFLOP budget, as many as its own and as far apart, about the fitted N*.

    N* counts at most to the edge of the budget's own sizes; a fit without an optimum leaves them as they are.
    """
    params = _params(fit.convention["params"])
    size = {
        int(w): float(np.log(count_params(plan.family.shape(int(w))).count(params)))
        for w in family_widths(plan.family)
    }
    mine = sorted(size[w] for w in own)
    try:
        best = np.log(fit.allocate(flops, flops_per_token_of(fit, plan.family))[0])
    except InputError:
        return sorted(own)
    shift = float(np.clip(best, mine[0], mine[-1])) - (mine[0] + mine[-1]) / 2
    found: list[int] = []
    for wanted in mine:
        free = [w for w in size if w not in found and make_like(plan, w, flops) is not None]
        found.append(min(free, key=lambda w: abs(size[w] - wanted - shift)))
    return sorted(found)
