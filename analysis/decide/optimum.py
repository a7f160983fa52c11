"""One search for every question about a budget: the N that loses least when what the limits leave goes into D."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.decide.limits import NONE, Limits
from analysis.inference import FitResult
from analysis.inference.repetition import R_PARAMS, R_TOKENS
from analysis.inference.solver import log_predictions
from analysis.laws.formulas import effective
from analysis.laws.law import Floats
from scaling.errors import InputError

FLAT = 1e-3
"""Relative loss within which sizes are told to be equal."""
_LEAST_N, _GRID, _ZOOMS = 1e2, 400, 4
_STEP, _HALVINGS = float(np.log(4.0)), 24
_WIDE, _AROUND = np.log(1e3), 161
_END = 0.1
"""Share of the draws at either end of N* whose regret is told: their median is that at the end of the 90% interval."""


@dataclass(frozen=True)
class Sureness:
    """How well N* is known at one budget."""

    n_interval: tuple[float | None, float | None]
    """90% of N* over every member's every resample of the runs, members by weight; None: not bounded within 1,000×."""
    d_interval: tuple[float | None, float | None]
    """D at those ends, larger N first, so that low < high."""
    flat: tuple[float, float]
    """Every N whose loss is within 0.1% of the least, the budget and the limits being kept."""
    regret: tuple[float, float]
    """Relative loss given up if the exponents sit where N* is at the low, at the high end of its interval."""


class Search:
    """The fit's loss where a budget and limits leave one free choice, N.

    Args:
        per_token: training FLOPs of a token as a function of N; 6·N when None.
    """

    def __init__(
        self, fit: FitResult, per_token: Callable[[Floats], Floats] | None = None, limits: Limits = NONE
    ) -> None:
        self.fit, self.limits = fit, limits
        self.exact = per_token
        self.per_token = per_token or (lambda n: 6.0 * n)
        self._n_of_unique = None if limits.unique_tokens is None else self._optimal_for(limits.unique_tokens)

    def tokens(self, n: Floats, budget: float, train: Floats | None = None) -> Floats:
        """D that a budget leaves at N: (C − w·serving(N)·D_inf) / training FLOPs a token, at most the limits'; 0 for none.

        A served token takes a third of a training token's FLOPs (forward alone).

        Args:
            train: training FLOPs of a token of the shapes that these N are; `per_token` of N when None.
        """
        train = self.per_token(n) if train is None else train
        left = budget - self.limits.serving_weight * train / 3 * self.limits.served_tokens
        return np.clip(left / train, 0.0, self.limits.max_tokens)

    def worth(self, n: Floats, d: Floats, *, r_tokens: float | None = None) -> tuple[Floats, Floats]:
        """N′ and D′, what N and D are worth as fresh tokens and parameters that they suffice for (Muennighoff, eqs. 5–7).

        Args:
            r_tokens: R_D; the limits' when None.
        """
        unique = self.limits.unique_tokens
        if unique is None or self._n_of_unique is None:
            return np.asarray(n, float), np.asarray(d, float)
        n_unique = np.minimum(n, self._n_of_unique)
        r_d = r_tokens or self.limits.r_tokens or R_TOKENS
        return effective(n, n_unique, R_PARAMS), effective(d, np.minimum(d, unique), r_d)

    def loss(self, n: Floats, d: Floats) -> Floats:
        """Loss at N and D, infinite where there are no tokens."""
        n, d = np.broadcast_arrays(np.asarray(n, float), np.asarray(d, float))
        some = d > 0
        out = np.full(n.shape, np.inf)
        out[some] = self.fit.predict(*self.worth(n[some], d[some]))
        return out

    def best(self, budget: float) -> tuple[float, float]:
        """N and D of least loss.

        Raises:
            InputError: limits that cannot both be kept at this budget, which it names; no optimum.
        """
        if self.limits == NONE:
            return self.fit.allocate(budget, self.exact)
        if self.limits.ratio_flag:
            return self._on_ratio(budget)
        high = budget / 6 if self.limits.max_params is None else min(self.limits.max_params, budget / 6)
        low = min(_LEAST_N, high / 10)
        if not self.tokens(np.array([low]), budget)[0] > 0:
            raise InputError(
                f"a budget of {budget:.3g} FLOPs and --served-tokens {self.limits.served_tokens:g} conflict: serving alone "
                "takes the budget at any size; raise one or lower the other"
            )
        ends = np.log(low), np.log(high)
        for _ in range(_ZOOMS):
            grid = np.exp(np.linspace(*ends, _GRID))
            k = int(np.argmin(self.loss(grid, self.tokens(grid, budget))))
            ends = (np.log(grid[max(k - 1, 0)]), np.log(grid[min(k + 1, _GRID - 1)]))
        n = float(grid[k])
        return n, float(self.tokens(np.array([n]), budget)[0])

    def sureness(self, budget: float, n_best: float) -> Sureness:
        """Interval, flat region and regret of a choice of N at a budget."""
        high = min(_WIDE, np.log(self.limits.max_params / n_best)) if self.limits.max_params else _WIDE
        offsets = np.unique(np.concatenate([np.linspace(-_WIDE, high, _AROUND), [0.0]]))
        grid = n_best * np.exp(offsets)
        d = self.tokens(grid, budget)
        keep = d > 0
        grid, d, offsets = grid[keep], d[keep], offsets[keep]
        chosen = int(np.argmin(np.abs(offsets)))
        columns = self.fit.columns(*self.worth(grid, d))
        mean = self.fit.ensemble.log_loss(columns)
        flat = _within(offsets, mean - mean.min(), FLAT)
        at, regret, weight = [], [], []
        for member in self.fit.ensemble.members:
            each = log_predictions(member.member.form, member.draws, columns)
            at.append(each.argmin(1))
            regret.append(np.expm1(each[:, chosen] - each.min(1)))
            weight.append(np.full(len(each), member.weight / len(each)))
        best, lost, share = (np.concatenate(parts) for parts in (at, regret, weight))
        order = np.argsort(best, kind="stable")
        best, lost, cumulated = best[order], lost[order], np.cumsum(share[order])
        ends = [min(int(np.searchsorted(cumulated, q)), len(best) - 1) for q in (0.05, 0.95)]
        indices = [min(int(best[ends[0]]), chosen), max(int(best[ends[1]]), chosen)]
        capped = self.limits.max_params is not None
        bounded = [indices[0] > 0, indices[1] < len(grid) - 1 or capped]
        n_ends = [float(grid[i]) if ok else None for i, ok in zip(indices, bounded, strict=True)]
        d_ends = [float(d[i]) if ok else None for i, ok in zip(indices, bounded, strict=True)]
        low, top = lost[cumulated <= _END], lost[cumulated >= 1 - _END]
        return Sureness(
            n_interval=(n_ends[0], n_ends[1]),
            d_interval=(d_ends[1], d_ends[0]),
            flat=(n_best * float(np.exp(flat[0])), n_best * float(np.exp(flat[1]))),
            regret=(float(np.median(low)) if len(low) else 0.0, float(np.median(top)) if len(top) else 0.0),
        )

    def _on_ratio(self, budget: float) -> tuple[float, float]:
        """N and D of a given D/N, the whole budget spent."""
        limits = self.limits
        ratio = limits.tokens_per_param
        if limits.overtrain is not None:
            n, d = self.fit.allocate(budget, self.exact)
            ratio = limits.overtrain * d / n
        assert ratio is not None
        grid = np.linspace(np.log(1.0), np.log(budget), 4 * _GRID)
        spent = np.log(self.per_token(np.exp(grid)) * ratio) + grid
        n = float(np.exp(np.interp(np.log(budget), spent, grid)))
        d = float(budget / self.per_token(np.array([n]))[0])
        if limits.max_params is not None and n > limits.max_params:
            raise InputError(
                f"{limits.ratio_flag} and {limits.max_params_source} conflict: {ratio:.3g} tokens a parameter at "
                f"{budget:.3g} FLOPs is N = {n:.3g}, above {limits.max_params:.3g}; raise the ratio or leave one out"
            )
        if d > limits.max_tokens:
            raise InputError(
                f"{limits.ratio_flag} and --max-epochs conflict: {ratio:.3g} tokens a parameter at {budget:.3g} FLOPs is "
                f"D = {d:.3g}, above {limits.max_epochs:g} epochs of {limits.unique_tokens:.3g}; lower the ratio or leave one out"
            )
        return n, d

    def _optimal_for(self, tokens: float) -> float:
        """The N that is compute-optimal for so many fresh tokens, by bisection over compute.

        From 20 tokens a parameter outwards: an ensemble need not have an optimum at compute that is out of all proportion.
        """

        def best(log_flops: float) -> tuple[float, float]:
            return self.fit.allocate(float(np.exp(log_flops)), self.exact)

        low = high = float(np.log(6 * tokens * max(tokens / 20, 10.0)))
        while best(low)[1] > tokens:
            low -= _STEP
        while best(high)[1] < tokens:
            high += _STEP
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if best(middle)[1] < tokens else (low, middle)
        return best(high)[0]


def _within(x: Floats, above: Floats, most: float) -> tuple[float, float]:
    """Ends of the range of x around the minimum where `above` ≤ most, interpolated."""
    k = int(np.argmin(above))
    left, right = k, k
    while left > 0 and above[left - 1] <= most:
        left -= 1
    while right < len(x) - 1 and above[right + 1] <= most:
        right += 1
    low = x[0] if left == 0 else np.interp(most, above[[left, left - 1]], x[[left, left - 1]])
    high = x[-1] if right == len(x) - 1 else np.interp(most, above[[right, right + 1]], x[[right, right + 1]])
    return float(low), float(high)
