"""How many experts: of several counts the one of least loss for a budget, where the fitted law knows experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from analysis.decide.allocate import family_widths
from analysis.inference import FitResult
from analysis.laws.law import Floats
from analysis.runs import Runs
from scaling.accounting import count_params, flops_per_token
from scaling.errors import InputError
from scaling.shape import Experts, ShapeFamily

_ONE_RAY = 0.1
"""Standard deviation of the runs' ln D/N up to which they lie on one ray."""


@dataclass(frozen=True)
class Candidate:
    """A number of experts, with the size and the tokens that the budget gives it."""

    experts: int
    """1: the dense model."""
    n_active: float
    """N that a token meets, body and head."""
    n_total: float
    """All parameters, which memory holds."""
    n_tokens: float
    loss: float
    fits: bool
    """Within the bounds on all parameters and on those that a token meets."""
    measured: bool
    """Between the least and the most experts of the runs."""


@dataclass(frozen=True)
class ExpertsChoice:
    """The numbers asked about, at one budget."""

    budget_flops: float
    tokens_per_param: float
    """D over the parameters that a token meets: the runs' own."""
    candidates: tuple[Candidate, ...]
    best: int | None
    """Of least loss among those that fit; None: none fits."""
    share: float
    """Of the resamples of the runs, in which it is the best too."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)


def sweep_experts(runs: Runs) -> Experts:
    """The sparse MLP of the sweep's runs, whatever its number of experts.

    Raises:
        InputError: runs of a file, which say nothing of shapes, or dense ones alone.
    """
    found = None if runs.plan is None else next((s.shape.experts for s in runs.plan.runs if s.shape.experts), None)
    if found is None:
        raise InputError(
            f"--experts: {runs.source} is no sweep with experts, so nothing says what their shapes hold; "
            "python -m scaling.sweep +grid=experts is one"
        )
    return found


def choose_experts(
    fit: FitResult,
    runs: Runs,
    budget_flops: float,
    counts: Sequence[int],
    max_total: float = float("inf"),
    max_active: float = float("inf"),
) -> ExpertsChoice:
    """Compare numbers of experts by the law of Clark et al. 2022 at the runs' own D/N, which it takes as given.

    Each count gets the N that a token meets with N·(D/N)·FLOPs per token = C. What memory would buy off that ray, fewer
    active parameters on more tokens, the law does not say.

    Args:
        fit: of the law experts.
        counts: numbers of experts; 1 is the dense model.
        max_total: parameters at most.
        max_active: parameters that a token meets at most; both with embeddings.
    Raises:
        InputError: no sweep with experts; runs on several D/N; fewer experts than a token goes to; a budget below the smallest shape.
    """
    assert runs.plan is not None
    experts = sweep_experts(runs)
    ratio = np.log(runs.table["n_tokens"] / runs.table["active_params"])
    if float(ratio.std()) > _ONE_RAY:
        low, high = np.exp(ratio.min()), np.exp(ratio.max())
        raise InputError(
            f"--experts: the runs have {low:.3g} to {high:.3g} tokens a parameter that a token meets, and the law experts, which "
            "has no D, holds for one such ratio only; fit a sweep like +grid=experts"
        )
    per_param, seen = float(np.exp(ratio.mean())), runs.table["experts"]
    candidates = []
    for count in dict.fromkeys(counts):
        family = replace(runs.plan.family, experts=None if count == 1 else replace(experts, n_experts=count))
        n, total, met = _sized(family, per_param, budget_flops)
        loss = float(fit.surface.predict(fit.parameters, active_params=n, experts=count))
        fits, measured = total <= max_total and met <= max_active, bool(seen.min() <= count <= seen.max())
        candidates.append(Candidate(count, n, total, n * per_param, loss, fits, measured))
    able = [c for c in candidates if c.fits]
    if not able:
        return ExpertsChoice(budget_flops, per_param, tuple(candidates), None, 0.0)
    best = min(able, key=lambda c: c.loss)
    draws = np.array([_losses(fit, c) for c in able])
    share = float((draws.argmin(0) == able.index(best)).mean())
    return ExpertsChoice(budget_flops, per_param, tuple(candidates), best.experts, share)


def _losses(fit: FitResult, candidate: Candidate) -> Floats:
    """(R,) of each resample."""
    values = np.stack([fit.samples[name] for name in fit.surface.free], axis=1)
    columns = {"active_params": np.array([candidate.n_active]), "experts": np.array([float(candidate.experts)])}
    return np.asarray(fit.surface.rows(values, columns)[0][:, 0])


def _sized(family: ShapeFamily, per_param: float, budget_flops: float) -> tuple[float, float, float]:
    """Parameters met (body and head), all, and all met, of the family's shape that spends the budget on its ray, in ln–ln."""
    shapes = [family.shape(int(w)) for w in family_widths(family)]
    counted = [count_params(s) for s in shapes]
    n = np.array([c.active("body_head") for c in counted], float)
    spent = n * per_param * np.array([flops_per_token(s).train for s in shapes])
    if budget_flops < spent[0]:
        raise InputError(
            f"--experts: {budget_flops:.3g} FLOPs are below the {spent[0]:.3g} of the smallest shape at {per_param:.3g} tokens a "
            "parameter"
        )
    of = (n, [c.total for c in counted], [c.active("total") for c in counted])
    met, total, all_met = (float(np.exp(np.interp(np.log(budget_flops), np.log(spent), np.log(y)))) for y in of)
    return met, total, all_met
