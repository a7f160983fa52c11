"""N and D for a budget: in closed form for C = 6·N·D, or with the exact FLOPs of a family of shapes, or under limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from analysis.decide.limits import NONE, Limits
from analysis.decide.optimum import Search, Sureness
from analysis.inference import FitResult
from analysis.inference.target import Target, cheapest
from analysis.laws.law import Floats
from scaling.accounting import PARAMS_CONVENTIONS, ParamCount, ParamsConvention, count_params, flops_per_token
from scaling.errors import InputError
from scaling.shape import ShapeFamily

_WIDEST = 1 << 20
B_OPT, B_CRIT = (0.0306, 0.383), (0.0471, 0.462)
"""Batch of least loss, and the one beyond which more devices hardly help: c·D^e sequences of 2048 tokens (Bergsma et al. 2025,
arXiv 2505.13738)."""
_SEQUENCE = 2048


@dataclass(frozen=True)
class Allocation:
    """The best point of a budget, with the loss that the fit gives there."""

    budget_flops: float
    n_params: float
    n_tokens: float
    loss: float
    interval_50: tuple[float, float]
    interval_90: tuple[float, float]
    sureness: Sureness
    train_flops: float
    """Less than the budget where tokens are served or limited."""
    epochs: float | None = None
    """D over the unique tokens, where they are limited."""
    repetition: tuple[float, float] | None = None
    """Loss at the ends of the interval of R_D, where the sweep measured it and D repeats; the other intervals are at R_D itself."""
    unlimited: tuple[float, float, float] | None = None
    """N, D and loss without the limits, where there are limits."""
    held: tuple[float, float] | None = None
    """All parameters, and those that a token meets, at N* of a family with experts."""

    @property
    def batch_tokens(self) -> tuple[float, float]:
        """B_opt and B_crit at D, tokens."""
        low, high = (c * self.n_tokens**e * _SEQUENCE for c, e in (B_OPT, B_CRIT))
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        sure = self.sureness
        return {
            "budget_flops": self.budget_flops,
            "n_params": self.n_params,
            "n_tokens": self.n_tokens,
            "loss": self.loss,
            "interval_50": list(self.interval_50),
            "interval_90": list(self.interval_90),
            "n_params_90": list(sure.n_interval),
            "n_tokens_90": list(sure.d_interval),
            "flat": list(sure.flat),
            "regret": list(sure.regret),
            "batch_tokens": list(self.batch_tokens),
            "train_flops": self.train_flops,
            "epochs": self.epochs,
            "loss_repetition_95": None if self.repetition is None else list(self.repetition),
            "unlimited": None if self.unlimited is None else list(self.unlimited),
            "params_total": None if self.held is None else self.held[0],
            "params_active": None if self.held is None else self.held[1],
        }


def allocate(
    fit: FitResult, budget_flops: float, family: ShapeFamily | None = None, limits: Limits = NONE
) -> Allocation:
    """N*, D* of least loss for a budget, how sure they are, and the loss there with its prediction intervals.

    Args:
        family: whose FLOPs per token count, in the fit's convention; C = 6·N·D when None.
        limits: the bounds to keep; the budget is then of training and serving together.
    Raises:
        InputError: no optimum, or limits that conflict at this budget.
    """
    search = Search(fit, flops_per_token_of(fit, family), limits)
    n, d = search.best(budget_flops)
    loss, low_high = predict_with_intervals(fit, *_floats(search.worth(np.array(n), np.array(d))))
    unlimited = None
    if limits != NONE:
        free = fit.allocate(budget_flops, search.exact)
        unlimited = (*free, float(fit.predict(*free)))
    train = d * float(search.per_token(np.array([n]))[0])
    epochs = None if limits.unique_tokens is None else d / limits.unique_tokens
    sure = search.sureness(budget_flops, n)
    held = None
    if family is not None and family.experts is not None:
        in_all, met = (_counts(family, count) for count in (ParamCount.count, ParamCount.active))
        named = _counts(family, ParamCount.count, _convention(fit.convention["params"]))
        held = _along(named, in_all, n), _along(named, met, n)
    repeated = None
    if limits.r_tokens_95 is not None and epochs is not None and epochs > 1:
        ends = [float(fit.predict(*search.worth(np.array(n), np.array(d), r_tokens=r))) for r in limits.r_tokens_95]
        repeated = ends[1], ends[0]
    return Allocation(budget_flops, n, d, loss, *low_high, sure, train, epochs, repeated, unlimited, held)


def cheapest_within(
    fit: FitResult, loss: float, smallest_flops: float, family: ShapeFamily | None = None, limits: Limits = NONE
) -> Target:
    """The least budget whose best point under the limits reaches `loss`; intervals as `cheapest` has them.

    Raises:
        InputError: a loss that no budget reaches, or none under the limits, which it names.
    """
    exact = flops_per_token_of(fit, family)
    if limits == NONE:
        return cheapest(fit, loss, smallest_flops, exact)
    cheapest(fit, loss, smallest_flops, exact)  # refuses a loss that is out of reach without the limits
    search = Search(fit, exact, limits)

    def best_worth(budget_flops: float) -> tuple[float, float]:
        return _floats(search.worth(*map(np.array, search.best(budget_flops))))

    try:
        found = cheapest(fit, loss, _least_budget(search, smallest_flops), at=best_worth)
    except InputError as error:
        raise InputError(
            f"--target-loss {loss:g} and {' and '.join(limits.names)} conflict: {error}; raise one or leave one out"
        ) from None
    n, d = search.best(found.budget_flops)
    return replace(found, n_params=n, n_tokens=d)


def _least_budget(search: Search, smallest_flops: float) -> float:
    """The smallest run's compute, and what serving even a small model takes."""
    served = search.limits.served_tokens * search.limits.serving_weight
    tiny = 10 * float(search.per_token(np.array([1e2]))[0])
    return max(smallest_flops, served * tiny)


def _floats(pair: tuple[Floats, Floats]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


def flops_per_token_of(fit: FitResult, family: ShapeFamily | None) -> Callable[[Floats], Floats] | None:
    """Training FLOPs of one token of a family in the fit's convention of N and C; None where C = 6·N·D."""
    if family is None or fit.convention["flops"] == "6nd":
        return None
    return family_flops_per_token(family, fit.convention["params"], fit.convention["flops"] != "full_attention")


def as_counted(fit: FitResult, family: ShapeFamily | None, params: float, flag: str, active: bool = False) -> float:
    """N in the fit's convention of the family's shape with so many parameters; `params` itself without a family.

    Args:
        flag: what bounds them, for messages.
        active: it bounds those that a token meets (they are read and multiplied for each), not all (they are held).
    Raises:
        InputError: runs from a file that count the active parameters, and a bound on all.
    """
    if family is None:
        if fit.convention["params"] == "active" and not active:
            raise InputError(
                f"{flag} and --convention active conflict: memory holds every expert, and these runs say only how many "
                "parameters a token meets; give the runs' total N, or --max-params"
            )
        return params
    given = _counts(family, ParamCount.active if active else ParamCount.count)
    return _along(given, _counts(family, ParamCount.count, _convention(fit.convention["params"])), params)


def _counts(
    family: ShapeFamily, count: Callable[[ParamCount, ParamsConvention], int], convention: ParamsConvention = "total"
) -> Floats:
    """Parameters of the family's shapes."""
    return np.array([count(count_params(family.shape(int(w))), convention) for w in family_widths(family)], float)


def _along(x: Floats, y: Floats, at: float) -> float:
    """y where x is `at`, between the family's shapes in ln–ln."""
    return float(np.exp(np.interp(np.log(at), np.log(x), np.log(y))))


def predict_with_intervals(
    fit: FitResult, n: float, d: float
) -> tuple[float, tuple[tuple[float, float], tuple[float, float]]]:
    """Loss at (N, D) and its central 50% and 90% intervals, as Python floats."""
    inner, outer = (tuple(float(side) for side in fit.predict_interval(n, d, level)) for level in (0.5, 0.9))
    return float(fit.predict(n, d)), ((inner[0], inner[1]), (outer[0], outer[1]))


@cache
def family_widths(family: ShapeFamily) -> np.ndarray:
    """Widths that the family has, thinned to steps of at least 1/256 above where they are that dense."""
    step = family.width_multiple
    if family.head_dim is not None:
        step = int(np.lcm(step, family.head_dim * family.gqa_ratio))
    widths, width = [], step
    while width <= _WIDEST:
        try:
            family.shape(width)
            widths.append(width)
        except InputError:  # not divisible by n_heads, or an odd head
            pass
        width += max(1, width // 256 // step) * step
    return np.array(widths)


@cache
def family_flops_per_token(family: ShapeFamily, convention: str, causal: bool = True) -> Callable[[Floats], Floats]:
    """Training FLOPs of one token as a function of N, interpolated in ln–ln between the family's shapes.

    Args:
        convention: which parameters N counts.
        causal: as in `scaling.accounting.flops_per_token`.
    """
    params = _convention(convention)
    shapes = [family.shape(int(w)) for w in family_widths(family)]
    ln_n = np.log([count_params(s).count(params) for s in shapes])
    ln_f = np.log([flops_per_token(s, causal).train for s in shapes])

    def per_token(n: Floats) -> Floats:
        inside = np.exp(np.interp(np.log(n), ln_n, ln_f))
        return np.where(np.log(n) < ln_n[0], n * np.exp(ln_f[0] - ln_n[0]), inside)

    return per_token


def best_width(
    fit: FitResult,
    family: ShapeFamily,
    budget_flops: float,
    tokens_per_param: tuple[float, float] | None = None,
    limits: Limits = NONE,
) -> int:
    """The family's width with the lowest predicted loss when the whole budget is spent on it.

    Args:
        tokens_per_param: range of D/N to stay in (the sweep's own, where the law was measured); ignored when no width
            of the family is inside.
        limits: bounds to keep; where they fix D/N, the width that comes nearest to it is the best.
    Raises:
        InputError: no width of the family is within the limits.
    """
    params = _convention(fit.convention["params"])
    widths = family_widths(family)
    shapes = [family.shape(int(w)) for w in widths]
    n = np.array([count_params(s).count(params) for s in shapes], float)
    search = Search(fit, flops_per_token_of(fit, family), limits)
    d = search.tokens(n, budget_flops, np.array([flops_per_token(s).train for s in shapes]))
    loss = search.loss(n, d)
    if limits.ratio_flag:
        best_n, best_d = search.best(budget_flops)
        loss, tokens_per_param = np.abs(np.log(np.maximum(d, 1.0) / n * best_n / best_d)), None
    if limits.max_params is not None:
        loss = np.where(n <= limits.max_params, loss, np.inf)
    if not np.isfinite(loss).any():
        raise InputError(
            f"{' and '.join(limits.names)}: no shape of the sweep's family is within it at {budget_flops:.3g} FLOPs; the "
            f"smallest, width {widths[0]}, has N = {n[0]:.3g}"
        )
    if tokens_per_param is not None:
        inside = (d / n >= tokens_per_param[0]) & (d / n <= tokens_per_param[1])
        if np.isfinite(loss[inside]).any():
            loss = np.where(inside, loss, np.inf)
    return int(widths[int(np.argmin(loss))])


def _convention(name: str) -> ParamsConvention:
    if name not in PARAMS_CONVENTIONS:
        raise InputError(
            f"runs counted as {name!r} have no shapes: exact FLOPs need a sweep ({', '.join(PARAMS_CONVENTIONS)})"
        )
    return name
