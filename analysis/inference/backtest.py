"""Rolling-origin backtest: fit the runs below a compute cut, predict those above, at every cut that leaves enough.

A member is a law with an emphasis k: run i enters its fit with weight (C_i / C_max)^k. A law that does not hold over all
scales holds longer near the largest, where a forecast starts; the backtest says how much emphasis pays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.inference.points import Points, compute_levels, frontier_rows, has_budgets
from analysis.inference.solver import HUBER, Robust, log_predictions, resolve, solve
from analysis.inference.uncertainty import FormError
from analysis.laws.law import Floats, Law
from analysis.laws.surface import get_law

EMPHASES = (0.0, 0.5, 1.0)
LARGE_SWEEP = ("chinchilla", "chinchilla_no_floor", "gamma", "kaplan")
SMALL_SWEEP = ("tied", "chinchilla_no_floor", "tied_no_floor")
"""Laws of the ensemble, and those of one for sweeps where no cut leaves enough runs to fit Chinchilla's law."""
BASELINE = "tied_no_floor"
"""The simple forecast that a law should beat: a pure power law."""
SHARPNESS = 4
"""A member's weight is (least backtest error / its backtest error)^SHARPNESS."""
RECENCY = 2.0
"""A cut counts e^RECENCY times the one below it: the last is the most like the forecast."""

_MAX_CUTS = 4
_LEAST_RANGE = 0.7


@dataclass(frozen=True)
class Member:
    """A law fitted with an emphasis on the larger runs."""

    law: str
    emphasis: float = 0.0

    @property
    def form(self) -> Law:
        """The law's form."""
        return get_law(self.law)


def emphasise(emphasis: float, log_flops: Floats) -> Floats:
    """(n,) weights (C / C_max)^emphasis."""
    weights: Floats = np.exp(emphasis * (log_flops - log_flops.max()))
    return weights


def fit_members(law: str, data: Points, emphases: Sequence[float], robust: Robust = HUBER) -> dict[Member, Floats]:
    """(p,) parameters of a law under each emphasis; the minimum without emphasis is where the others start."""
    form = get_law(law)
    plain = solve(form, data.columns, data.loss, robust).values[0]
    out = {Member(law): plain}
    others = [k for k in emphases if k]
    if others:
        weights = np.array([emphasise(k, data.log_flops) for k in others])
        refit = resolve(form, data.columns, data.loss, plain, weights, robust).values
        out |= {Member(law, k): v for k, v in zip(others, refit, strict=True)}
    return {m: v for m, v in out.items() if m.emphasis in emphases}


@dataclass(frozen=True)
class BacktestRow:
    """One cut: what the runs up to `cut_flops` said about those above. Errors are ln(actual / predicted)."""

    law: str
    """A law's name, or "ensemble"."""
    emphasis: float
    cut_flops: float
    n_fitted: int
    n_held_out: int
    ratio: float
    """Largest held-out compute over the cut."""
    mean_error: float
    rms_error: float
    mean_log_ratio: float
    """Mean of ln(C / cut) over the held-out runs."""
    coverage_50: float | None = None
    """Share of held-out runs inside the interval of parameters, members' disagreement and run noise; None: no interval."""
    coverage_90: float | None = None
    model_sd: float = 0.0
    """That interval's standard deviation of ln loss without run noise, root mean square over the held-out runs."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def cuts(data: Points, minimum_cells: int) -> list[float]:
    """ln C of up to four cuts, the highest, between compute levels; below each, at least `minimum_cells` cells over a factor 2 in C."""
    if has_budgets(data):
        level = compute_levels(data)
        edges = np.array([data.log_flops[level == k].max() for k in range(level.max())])
    else:
        edges = np.quantile(data.log_flops, np.linspace(0.6, 0.9, _MAX_CUTS))
    first = data.log_flops.min() + _LEAST_RANGE
    usable = [float(e) for e in edges if e >= first and (data.log_flops > e).any()]
    good = [e for e in usable if data.take(data.log_flops <= e).n_cells >= minimum_cells]
    return good[-_MAX_CUTS:]


@dataclass(frozen=True)
class Errors:
    """A member's errors above one cut."""

    cut: float
    values: Floats
    """(p,) fitted below."""
    error: Floats
    """(held out,) ln(actual / predicted)."""


def backtest(
    law: str, data: Points, at: Sequence[float], emphases: Sequence[float] = (0.0,), robust: Robust = HUBER
) -> dict[Member, tuple[Errors, ...]]:
    """Hold out everything above each cut (ln C), refit, predict; cuts that leave fewer cells than parameters have none."""
    form = get_law(law)
    if form.on_frontier:
        data = data.take(frontier_rows(data))
    found: dict[Member, tuple[Errors, ...]] = {Member(law, k): () for k in emphases}
    for cut in at:
        below, above = data.take(data.log_flops <= cut), data.take(data.log_flops > cut)
        if below.n_cells < len(form.free) or not len(above):
            continue
        for member, values in fit_members(law, below, emphases, robust).items():
            error = np.log(above.loss) - log_predictions(form, values[None], above.columns)[0]
            found[member] += (Errors(cut, values, error),)
    return found


def row(member: str, emphasis: float, data: Points, cut: float, error: Floats) -> BacktestRow:
    """The figures of one cut."""
    above = data.log_flops > cut
    return BacktestRow(
        law=member,
        emphasis=emphasis,
        cut_flops=float(np.exp(cut)),
        n_fitted=int((~above).sum()),
        n_held_out=len(error),
        ratio=float(np.exp(data.log_flops.max() - cut)),
        mean_error=float(error.mean()),
        rms_error=float(np.sqrt((error**2).mean())),
        mean_log_ratio=float((data.log_flops[above] - cut).mean()),
    )


def recency(count: int) -> Floats:
    """(count,) weights of cuts in ascending order, summing to 1."""
    raw = np.exp(RECENCY * (np.arange(count) - count))
    return raw / raw.sum()


def score(errors: Sequence[Errors]) -> float:
    """Root of the recency-weighted mean over cuts of the mean square error; infinite without a cut."""
    if not errors:
        return float("inf")
    return float(np.sqrt(recency(len(errors)) @ [float((e.error**2).mean()) for e in errors]))


@dataclass(frozen=True)
class Choice:
    """What the backtest of an ensemble's members says."""

    weights: dict[Member, float]
    """Of every member that could be judged, (least score / its score)^SHARPNESS, summing to 1."""
    errors: dict[Member, tuple[Errors, ...]]
    baseline: tuple[Errors, ...]


def choose(data: Points, robust: Robust = HUBER) -> Choice:
    """Weigh the members, all at the same cuts.

    Without a cut the weight goes to Chinchilla's law, or to the largest of SMALL_SWEEP that the runs suffice for.
    """
    sweeps = ((LARGE_SWEEP, "chinchilla"), (SMALL_SWEEP, BASELINE))
    tried = [(names, cuts(data, len(get_law(smallest).free) + 1)) for names, smallest in sweeps]
    laws, at = next((t for t in tried if t[1]), ((), []))
    if not at:
        enough = [n for n in ("chinchilla", *SMALL_SWEEP) if len(get_law(n).free) <= data.n_cells]
        return Choice({Member(enough[0] if enough else BASELINE): 1.0}, {}, ())
    table: dict[Member, tuple[Errors, ...]] = {}
    for name in laws:
        table |= backtest(name, data, at, EMPHASES, robust)
    most = max(len(e) for e in table.values())
    table = {m: e for m, e in table.items() if len(e) == most}
    scores = {m: score(e) for m, e in table.items()}
    return Choice(weigh(scores), table, backtest(BASELINE, data, at, robust=robust)[Member(BASELINE)])


def judge(law: str, data: Points, robust: Robust = HUBER) -> Choice:
    """One law by itself: all the weight, and its backtest."""
    at = cuts(data, len(get_law(law).free) + 1)
    errors = backtest(law, data, at, robust=robust)
    baseline = backtest(BASELINE, data, at, robust=robust)[Member(BASELINE)]
    return Choice({Member(law): 1.0}, errors if errors[Member(law)] else {}, baseline)


def weigh(scores: Mapping[Member, float]) -> dict[Member, float]:
    """(least score / score)^SHARPNESS, summing to 1."""
    least = max(min(scores.values()), 1e-9)
    raw = {m: (least / max(s, 1e-9)) ** SHARPNESS for m, s in scores.items()}
    total = sum(raw.values())
    return {m: w / total for m, w in raw.items()}


def form_error(rows: Sequence[BacktestRow], noise: float) -> FormError:
    """Law-form error per e-fold of compute from a backtest: what its mean errors exceed model and run noise by.

    τ² = (prior² + Σ_cuts w (ē² − σ_model² − σ_run²/n)₊ / x̄²) / (1 + Σ w), x̄ the mean extrapolation ln(C/cut), w the
    recency weights relative to the last cut's.
    """
    if not rows:
        return FormError(FormError.PRIOR, 1)
    w = recency(len(rows)) / recency(len(rows)).max()
    terms = np.array(
        [max(r.mean_error**2 - r.model_sd**2 - noise**2 / r.n_held_out, 0.0) / r.mean_log_ratio**2 for r in rows]
    )
    tau2 = (FormError.PRIOR**2 + w @ terms) / (1 + w.sum())
    return FormError(float(np.sqrt(tau2)), 1 + len(rows))
