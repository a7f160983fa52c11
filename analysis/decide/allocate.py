"""N and D for a budget: in closed form for C = 6·N·D, or with the exact FLOPs of a family of shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.inference import FitResult
from analysis.laws.law import Floats
from scaling.accounting import PARAMS_CONVENTIONS, ParamsConvention, count_params, flops_per_token
from scaling.errors import InputError
from scaling.shape import ShapeFamily

_WIDEST = 1 << 20


@dataclass(frozen=True)
class Allocation:
    """The compute-optimal point of a budget, with the loss that the law gives there."""

    budget_flops: float
    n_params: float
    n_tokens: float
    loss: float
    interval_50: tuple[float, float]
    interval_90: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {**vars(self), "interval_50": list(self.interval_50), "interval_90": list(self.interval_90)}


def allocate(fit: FitResult, budget_flops: float, family: ShapeFamily | None = None) -> Allocation:
    """Compute-optimal N*, D* and the loss there with its prediction intervals.

    Args:
        family: whose FLOPs per token count, in the fit's convention; C = 6·N·D when None.
    """
    n, d = fit.allocate(budget_flops, flops_per_token_of(fit, family))
    loss, low_high = predict_with_intervals(fit, n, d)
    return Allocation(budget_flops, n, d, loss, *low_high)


def flops_per_token_of(fit: FitResult, family: ShapeFamily | None) -> Callable[[Floats], Floats] | None:
    """Training FLOPs of one token of a family in the fit's convention of N and C; None where C = 6·N·D."""
    if family is None or fit.convention["flops"] == "6nd":
        return None
    return family_flops_per_token(family, fit.convention["params"], fit.convention["flops"] != "full_attention")


def predict_with_intervals(
    fit: FitResult, n: float, d: float
) -> tuple[float, tuple[tuple[float, float], tuple[float, float]]]:
    """Loss at (N, D) and its central 50% and 90% intervals, as Python floats."""
    inner, outer = (tuple(float(side) for side in fit.predict_interval(n, d, level)) for level in (0.5, 0.9))
    return float(fit.predict(n, d)), ((inner[0], inner[1]), (outer[0], outer[1]))


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
    fit: FitResult, family: ShapeFamily, budget_flops: float, tokens_per_param: tuple[float, float] | None = None
) -> int:
    """The family's width with the lowest predicted loss when the whole budget is spent on it.

    Args:
        tokens_per_param: range of D/N to stay in (the sweep's own, where the law was measured); ignored when no width
            of the family is inside.
    """
    params = _convention(fit.convention["params"])
    widths = family_widths(family)
    shapes = [family.shape(int(w)) for w in widths]
    n = np.array([count_params(s).count(params) for s in shapes], float)
    d = budget_flops / np.array([flops_per_token(s).train for s in shapes])
    loss = np.asarray(fit.predict(n, d))
    if tokens_per_param is not None:
        inside = (d / n >= tokens_per_param[0]) & (d / n <= tokens_per_param[1])
        if inside.any():
            loss = np.where(inside, loss, np.inf)
    return int(widths[int(np.argmin(loss))])


def _convention(name: str) -> ParamsConvention:
    if name not in PARAMS_CONVENTIONS:
        raise InputError(
            f"runs counted as {name!r} have no shapes: exact FLOPs need a sweep ({', '.join(PARAMS_CONVENTIONS)})"
        )
    return name
