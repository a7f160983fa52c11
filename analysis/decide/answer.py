"""Everything that a fit says about the questions asked of it: what `analysis.fit` prints and writes as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.decide.allocate import (
    Allocation,
    allocate,
    cheapest_within,
    flops_per_token_of,
    predict_with_intervals,
)
from analysis.decide.forecast import extrapolation_warnings
from analysis.decide.limits import NONE, Limits
from analysis.inference import FitResult
from analysis.inference.conventions import ConventionFit
from analysis.inference.diagnostics import Diagnostics, beyond_n_and_d, diagnose, inseparable
from analysis.inference.fitting import LARGE
from analysis.inference.isoflop import LossSurface, approach_2_bias, at_budget, disagreement
from analysis.inference.points import points
from analysis.inference.profile import Interval, profile_intervals
from analysis.inference.solver import HUBER, Robust
from analysis.inference.target import Target
from analysis.runs import Runs
from scaling.errors import InputError

if TYPE_CHECKING:  # the layout planner, of which only a plan asks
    from analysis.decide.cluster import ClusterPlan
    from analysis.decide.experts import ExpertsChoice
    from scaling.cost import Cost

ABSURD = 1e5
"""Times the largest run's compute, beyond which a budget is called out of proportion: 26 times the longest reach published."""
_KNOTS_PER_DECADE = 1
PROFILED = ("chinchilla", "tied", "chinchilla_no_floor", "tied_no_floor", "gamma")
"""Laws whose weak parameters get a profile interval."""


@dataclass(frozen=True)
class Answer:
    """A fit and what was asked of it."""

    fit: FitResult
    runs: Runs
    robust: Robust
    budgets: tuple[float, ...]
    """FLOPs."""
    allocations: tuple[Allocation, ...]
    """At the budgets; none for a law without N and D, or without an optimum (`warnings` say so)."""
    approaches: dict[str, dict[str, Any]]
    """"1", "2", "3": as `FitResult.approaches`, with "allocations" at the budgets, each with its difference from what
    predicts; "2" with its "bias"."""
    diagnostics: Diagnostics
    warnings: tuple[str, ...]
    target: Target | None = None
    predictions: tuple[dict[str, Any], ...] = ()
    conventions: tuple[ConventionFit, ...] = ()
    profiles: dict[str, Interval] = field(default_factory=dict)
    """95% profile intervals of the parameters that are not identified; None: open on that side."""
    dropped: tuple[str, ...] = field(default=())
    """Runs that the user left out."""
    limits: Limits = NONE
    """That allocations and target keep."""
    costs: tuple[Cost, ...] = ()
    """Of the allocations' training at the MFU asked for, where a device or money was."""
    plan: ClusterPlan | None = None
    """Of the first budget, where a number of devices was given."""
    experts: tuple[ExpertsChoice, ...] = ()
    """At the budgets, where numbers of experts were asked about and the law knows them."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of the command."""
        fit = self.fit
        return {
            "data": self.runs.source,
            "n_runs": fit.n_runs,
            "dropped": list(self.dropped),
            "convention": self.runs.convention,
            "law": fit.law,
            "parameters": fit.parameters,
            "objective": fit.objective,
            "loss_function": self.robust.name,
            "intervals_95": {name: list(pair) for name, pair in fit.intervals.items()},
            "identified": self.diagnostics.identified,
            "profile_95": {name: list(pair) for name, pair in self.profiles.items()},
            "condition": fit.condition if np.isfinite(fit.condition) else None,
            "starts": {"tried": fit.starts, "agreeing": fit.starts_agreeing},
            "ensemble": [
                {"law": m.member.law, "emphasis": m.member.emphasis, "weight": m.weight} for m in fit.ensemble.members
            ],
            "seed_noise": fit.seed_noise,
            "run_noise": fit.run_noise,
            "extrapolation_ratio": max(
                (fit.extrapolation_ratio(a.budget_flops) for a in self.allocations), default=None
            ),
            "allocations": [a.to_dict() for a in self.allocations],
            "limits": self.limits.to_dict(),
            "costs": [{k: v for k, v in vars(c).items() if k != "ranges"} for c in self.costs],
            "plan": None if self.plan is None else self.plan.to_dict(),
            "experts": [choice.to_dict() for choice in self.experts],
            "target": None if self.target is None else self.target.to_dict(),
            "predictions": list(self.predictions),
            "approaches": self.approaches,
            "backtest": list(fit.backtest),
            "conventions": [c.to_dict() for c in self.conventions],
            "diagnostics": self.diagnostics.to_dict(),
            "warnings": [*self.warnings, *self.runs.notes],
        }


def answer(
    fit: FitResult,
    runs: Runs,
    budgets: Sequence[float],
    *,
    robust: Robust = HUBER,
    target_loss: float | None = None,
    at: Sequence[tuple[float, float]] = (),
    conventions: tuple[ConventionFit, ...] = (),
    dropped: Sequence[str] = (),
    limits: Limits = NONE,
) -> Answer:
    """Ask a fit.

    Args:
        runs: that `fit` was fitted on.
        budgets: FLOPs, at least one.
        robust: the loss that the law was fitted with.
        target_loss: the cheapest compute that reaches it is asked for.
        at: N and D of the predictions asked for.
        conventions: from `compare_conventions`.
        dropped: ids of the runs that the user left out.
        limits: that allocations and target keep.
    Raises:
        InputError: a budget that is not a positive number; a target loss out of range; limits that conflict.
    """
    for budget in budgets:
        if not 0 < budget < float("inf"):
            raise InputError(f"--budget {budget:g}: must be a positive number of FLOPs")
    if (more := beyond_n_and_d(fit.surface)) and (target_loss is not None or at):
        raise InputError(
            f"--law {fit.law} needs {', '.join(more)} beside N and D: it has no answer to --target-loss or --predict"
        )
    allocations, refused = _allocations(fit, runs, budgets, limits)
    far = max(fit.extrapolation_ratio(b) for b in budgets)
    target = None
    if target_loss is not None:
        family = runs.plan.family if runs.plan is not None else None
        smallest = float(runs.table["flops"].min())
        target = cheapest_within(fit, target_loss, smallest, family, limits)
    diagnostics = diagnose(fit, runs, _watched(fit, runs, allocations, budgets[-1]), robust)
    return Answer(
        fit=fit,
        runs=runs,
        robust=robust,
        budgets=tuple(budgets),
        allocations=allocations,
        approaches=_compared(fit, runs, budgets, bool(allocations)),
        diagnostics=diagnostics,
        profiles=_profiles(fit, runs, diagnostics, robust),
        warnings=(
            *fit.warnings,
            *extrapolation_warnings(fit, far),
            *_odd(budgets, float(runs.table["flops"].min()), fit.largest_flops),
            *refused,
        ),
        limits=limits,
        target=target,
        predictions=tuple(_prediction(fit, n, d) for n, d in at),
        conventions=conventions,
        dropped=tuple(dropped),
    )


def _odd(budgets: Sequence[float], smallest_flops: float, largest_flops: float) -> list[str]:
    """Of budgets below the smallest run, which ask the law for what lies under its data, and of those out of all proportion."""
    below = [
        f"a budget of {c:.3g} FLOPs is below the smallest run's {smallest_flops:.3g}: the law was not measured there"
        for c in budgets
        if c < smallest_flops * 0.99
    ]
    return below + [
        f"a budget of {c:.3g} FLOPs is {c / largest_flops:.2g}× the largest run's: no forecast was ever checked that far out; "
        "read the answer as arithmetic"
        for c in budgets
        if c > ABSURD * largest_flops
    ]


def _profiles(fit: FitResult, runs: Runs, diagnostics: Diagnostics, robust: Robust) -> dict[str, Interval]:
    """Of the parameters that the bootstrap does not pin down, where their profile has a meaning."""
    weak = [name for name in fit.surface.free if not diagnostics.identified[name]]
    plain = fit.law in PROFILED and robust.name in ("huber", "squared") and not fit.surface.on_frontier
    if not weak or not plain or not len(fit.surface.free) < fit.n_runs <= LARGE:
        return {}
    return profile_intervals(fit.surface, points(runs), fit.surface.values(fit.parameters), robust, weak)


def _allocations(
    fit: FitResult, runs: Runs, budgets: Sequence[float], limits: Limits
) -> tuple[tuple[Allocation, ...], tuple[str, ...]]:
    """Every budget's allocation, or why there is none."""
    if fit.surface.on_frontier:
        return (), (f"the law {fit.law} is one of compute alone: it has no N* and D*",)
    if more := beyond_n_and_d(fit.surface):
        return (), (f"the law {fit.law} is not asked about budgets: it needs {', '.join(more)} beside N and D",)
    if reason := inseparable(points(runs)):
        return (), (f"no N* and D*: {reason}; --predict gives the loss at sizes like theirs",)
    family = runs.plan.family if runs.plan is not None else None
    try:
        if limits == NONE:
            return tuple(allocate(fit, budget, family) for budget in budgets), ()
        fit.allocate(budgets[0])  # no optimum is a property of the fit; limits that conflict are the user's to mend
    except InputError as error:
        return (), (f"no N* and D*: {error}",)
    return tuple(allocate(fit, budget, family, limits) for budget in budgets), ()


def _watched(
    fit: FitResult, runs: Runs, allocations: Sequence[Allocation], budget_flops: float
) -> tuple[float, float] | None:
    """N and D at which a run's influence is told: the last budget's optimum, or that budget at the runs' mean D/N."""
    if beyond_n_and_d(fit.surface):
        return None
    if allocations:
        return allocations[-1].n_params, allocations[-1].n_tokens
    ratio = float(np.exp(np.log(runs.table["n_tokens"] / runs.table["n_params"]).mean()))
    pairs = budget_flops / (6 * fit.flops_ratio)
    return float(np.sqrt(pairs / ratio)), float(np.sqrt(pairs * ratio))


def _prediction(fit: FitResult, n: float, d: float) -> dict[str, Any]:
    loss, (inner, outer) = predict_with_intervals(fit, n, d)
    return {"n_params": n, "n_tokens": d, "loss": loss, "interval_50": list(inner), "interval_90": list(outer)}


def _compared(fit: FitResult, runs: Runs, budgets: Sequence[float], has_optimum: bool) -> dict[str, dict[str, Any]]:
    """Each approach with its N* and D* at the budgets; against what predicts, where that has an optimum."""
    found: dict[str, dict[str, Any]] = {key: dict(value) for key, value in fit.approaches.items()}
    held = {key: value for key, value in found.items() if "reason" not in value}
    try:
        surface = _surface(fit, runs, budgets) if has_optimum and held else None
    except InputError:  # an optimum at the budgets, none at the smaller ones that wasted compute asks about
        surface = None
    for key, value in held.items():
        rows = []
        for c in budgets:
            n, d = at_budget(value, c)
            against = disagreement({key: value}, surface, c)[key] if surface is not None else {}
            rows.append({"budget_flops": c, "n_params": n, "n_tokens": d, **against})
        value["allocations"] = rows
    if surface is not None and "2" in held:
        found["2"]["bias"] = approach_2_bias(points(runs), surface, budgets)
    return found


def _surface(fit: FitResult, runs: Runs, budgets: Sequence[float]) -> LossSurface:
    """What predicts, as the approaches are compared on it; its optimum from a table over the budgets that are met, since
    wasted compute asks for it some 50 times."""
    family = runs.plan.family if runs.plan is not None else None
    exact = flops_per_token_of(fit, family)
    per_token = exact or (lambda n: 6.0 * n)
    low, high = np.log10(float(runs.table["flops"].min())), np.log10(1.01 * max(budgets))
    knots = np.linspace(min(low, high - 1), high, max(int(_KNOTS_PER_DECADE * (high - low)), 4) + 1)
    sizes = np.log([fit.allocate(float(10**x), exact)[0] for x in knots])
    slope = (sizes[1] - sizes[0]) / (knots[1] - knots[0])

    def optimum(flops: float) -> tuple[float, float]:
        x = np.log10(flops)
        n = float(np.exp(np.interp(x, knots, sizes) + slope * min(x - knots[0], 0.0)))
        return n, float(flops / per_token(np.array([n]))[0])

    return LossSurface(fit.predict, optimum, per_token)
