"""The sealed forecast of one run: what to train with a budget, and the loss it will come to."""

from __future__ import annotations

import dataclasses
import datetime
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from analysis.decide.allocate import best_width, family_flops_per_token, predict_with_intervals
from analysis.decide.limits import NONE, Limits
from analysis.decide.optimum import Search
from analysis.decide.path import LEAST_RUNS, Paths
from analysis.inference import FitResult
from analysis.inference.uncertainty import t_quantile
from analysis.runs import Runs
from scaling.accounting import ParamsConvention, count_params, flops_per_token
from scaling.config import to_dict
from scaling.errors import InputError
from scaling.records import CurvePoint, Forecast, Plan
from scaling.spec import RunSpec
from scaling.sweepdir import RunDir

AMBER_FROM, RED_FROM = 30.0, 300.0
"""Extrapolation ratios above which a forecast is marked amber, red (Chinchilla went 192×, Llama 3 3,800×)."""

_VOLATILE = ("created", "seal")
CURVE_POINTS = 20
"""As often as train.flagship evaluates."""
_RATIO_OFF = 0.02
"""Relative difference from the D/N asked for, from which it is noted: a family has only so many widths."""
_NO_CURVE = (
    "the forecast is of the end point alone: fewer than four runs of the sweep have their metrics.jsonl at hand"
)


def extrapolation_colour(ratio: float) -> Literal["green", "amber", "red"]:
    """≤ 30× green, ≤ 300× amber, more red."""
    return "green" if ratio <= AMBER_FROM else "amber" if ratio <= RED_FROM else "red"


def make_forecast(
    fit: FitResult, runs: Runs, budget_flops: float, seed: int | None = None, limits: Limits = NONE
) -> Forecast:
    """Forecast the run that spends `budget_flops` best among the sweep's family of shapes.

    The shape is the best width whose D/N lies in the range that the sweep measured; the recipe, data, optimizer,
    schedule and evaluation are the plan's. Equal inputs give an equal forecast, `created` and seal apart.

    Args:
        runs: of a sweep directory; what `fit` was fitted on.
        seed: of the flagship; that of the largest run when None.
        limits: bounds that shape and tokens keep; the flagship reads no more different tokens than they allow.
    Raises:
        InputError: runs that come from no sweep, or are counted otherwise than the engine counts (exact FLOPs, nats per
            token), a budget below one batch, or limits that no shape of the family keeps.
    """
    plan = runs.plan
    engine = {"flops": "exact", "loss": "nats_per_token"}
    if plan is not None and (others := [k for k, v in engine.items() if fit.convention[k] != v]):
        raise InputError(
            f"runs read with {' and '.join(f'{k} {fit.convention[k]}' for k in others)}: a forecast is in what the flagship "
            "is watched in, exact FLOPs and nats per token; leave out --flops and --loss-unit, or --out"
        )
    if plan is None:
        raise InputError(f"{runs.source} is not a sweep directory: a forecast needs its plan (shapes and recipe)")
    search = Search(fit, family_flops_per_token(plan.family, _params(fit)), limits)
    spec, notes = _flagship(search, plan, runs, budget_flops, seed)
    n, d = (
        float(x) for x in search.worth(np.array(count_params(spec.shape).count(_params(fit))), np.array(spec.tokens))
    )
    loss, (inner, outer) = predict_with_intervals(fit, n, d)
    n_star, d_star = search.best(budget_flops)
    ratio = fit.extrapolation_ratio(spec.flops)
    paths, final_sd = Paths(fit, runs, search.worth), float(fit.predictive_sd(n, d))
    curve = _curve(paths, spec, loss)
    forecast = Forecast(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        sweep=runs.source,
        run_ids=list(fit.run_ids),
        laws=_laws(fit),
        convention=dict(fit.convention),
        target_flops=float(budget_flops),
        n_params=n_star,
        n_tokens=d_star,
        spec=spec,
        loss=loss,
        interval_50=inner,
        interval_90=outer,
        curve=curve,
        extrapolation_ratio=ratio,
        extrapolation_colour=extrapolation_colour(ratio),
        notes=[
            *fit.warnings,
            *runs.notes,
            *extrapolation_warnings(fit, ratio),
            *notes,
            *([] if curve else [_NO_CURVE]),
        ],
        channels=paths.channels(spec, final_sd) if curve else [],
        limits=limits.to_dict(),
    )
    return dataclasses.replace(forecast, seal=forecast.computed_seal())


def _laws(fit: FitResult) -> list[dict[str, Any]]:
    """Every member of what predicts, the heaviest first."""
    return [
        {
            "name": m.member.law,
            "weight": m.weight,
            "emphasis": m.member.emphasis,
            "loss": m.member.robust.name,
            "parameters": m.member.form.parameters(m.values),
        }
        for m in sorted(fit.ensemble.members, key=lambda m: -m.weight)
    ]


def extrapolation_warnings(fit: FitResult, ratio: float) -> list[str]:
    """What to know of a budget at `ratio` times the largest run's compute; nothing below red."""
    if extrapolation_colour(ratio) != "red":
        return []
    longest = max((row["ratio"] for row in fit.backtest), default=None)
    tested = "nothing was backtested" if longest is None else f"the backtest reached {longest:.3g}×"
    return [
        f"{ratio:.3g}× the largest run's compute is red (above {RED_FROM:g}×): {tested}, and Llama 3's 3,800× is the longest "
        "reach published; train something in between first"
    ]


def _params(fit: FitResult) -> ParamsConvention:
    convention: ParamsConvention = fit.convention["params"]  # type: ignore[assignment]
    return convention


def _flagship(
    search: Search, plan: Plan, runs: Runs, budget_flops: float, seed: int | None
) -> tuple[RunSpec, list[str]]:
    """The RunSpec of the budget within the limits, and remarks on it."""
    from scaling.grid import make_run
    from scaling.recipe import recipe_from_dict

    fit, limits = search.fit, search.limits
    fitted = set(fit.run_ids)
    largest = max((s for s in plan.runs if s.run_id in fitted), key=lambda s: (s.flops, -s.seed), default=None)
    if largest is None:
        raise InputError(f"{runs.source}: none of the fitted runs is in the sweep's plan.json")
    per_param = (runs.table["n_tokens"] / runs.table["n_params"]).to_numpy(float)
    width = best_width(fit, plan.family, budget_flops, (float(per_param.min()), float(per_param.max())), limits)
    budget = {"flops": budget_flops}
    if limits != NONE:
        shape = plan.family.shape(width)
        n, train = count_params(shape).count(_params(fit)), flops_per_token(shape).train
        budget = {"tokens": float(search.tokens(np.array([n]), budget_flops, np.array([train]))[0])}
    spec = make_run(
        plan.family,
        width,
        **budget,
        recipe=recipe_from_dict(plan.recipe),
        data=largest.data,
        optim=largest.optim,
        schedule=largest.schedule,
        eval=largest.eval,
        seed=largest.seed if seed is None else seed,
        precision=largest.precision,
        divergence_factor=largest.divergence_factor,
    )
    notes = []
    if spec.tokens > limits.max_tokens:  # rounded up to a whole batch
        spec = dataclasses.replace(spec, tokens=spec.tokens - spec.batch_tokens)
    if limits.ratio_flag:
        n_best, d_best = search.best(budget_flops)
        near, asked = spec.tokens / count_params(spec.shape).count(_params(fit)), d_best / n_best
        if abs(near / asked - 1) > _RATIO_OFF:
            notes.append(f"D/N is {near:.3g} where {limits.ratio_flag} asks for {asked:.3g}: no width comes nearer")
    if limits.unique_tokens is not None and limits.unique_tokens < plan.data.train_tokens:
        unique = int(limits.unique_tokens)
        most = max(spec.data.max_epochs, spec.tokens / unique)
        spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, unique_tokens=unique, max_epochs=most))
    if limits.unique_tokens is not None and spec.tokens > limits.unique_tokens:
        notes.append(
            f"the run reads its {limits.unique_tokens:.3g} tokens {spec.tokens / limits.unique_tokens:.3g} times: what repeated "
            f"tokens are worth is {limits.repetition}"
        )
    epochs = spec.tokens / spec.data.unique(plan.data.train_tokens)
    if epochs > spec.data.max_epochs:
        notes.append(
            f"the run would read the corpus {epochs:.3g} times (limit {spec.data.max_epochs:g}): it needs more text, "
            "and the law was measured on fresh tokens"
        )
    return spec, notes


def _curve(paths: Paths, spec: RunSpec, final_loss: float) -> list[CurvePoint]:
    """Held-out loss along the run with its band, which at the end is the forecast's (analysis.decide.path)."""
    if len(paths) < LEAST_RUNS:
        return []
    fractions = np.arange(1, CURVE_POINTS + 1) / CURVE_POINTS
    points = []
    for fraction, up, sd, freedom in zip(fractions, *paths.curve(spec, fractions), strict=True):
        loss, half = final_loss * math.exp(up), [t_quantile(level, freedom) * sd for level in (0.5, 0.9)]
        bands = [(loss * math.exp(-h), loss * math.exp(h)) for h in half]
        points.append(CurvePoint(round(fraction * spec.tokens), loss, bands[0], bands[1]))
    return points


def write_forecast(path: Path, forecast: Forecast) -> Forecast:
    """Write forecast.json; an existing one that says the same is kept.

    Returns:
        The forecast that is in the file afterwards.
    Raises:
        InputError: a different forecast is there and the run that it asked for was started.
    """
    if path.exists():
        existing = Forecast.read(path)
        if _same(_content(existing), _content(forecast)):
            return existing
        started = _started(path.parent, existing.spec.forecast_id)
        if started is not None:
            raise InputError(
                f"{path} holds the forecast of a run that was started ({started}), and this one differs from it: "
                "write it elsewhere with --out DIR, or remove that run first"
            )
    forecast.write(path)
    return forecast


def _content(forecast: Forecast) -> dict[str, Any]:
    return {key: value for key, value in to_dict(forecast).items() if key not in _VOLATILE}


def _same(a: Any, b: Any) -> bool:
    """Equal, floats to six digits: the order of a BLAS sum depends on its threads."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12)
    return bool(a == b)


def _started(folder: Path, run_id: str) -> Path | None:
    """The run folder beside a forecast in which its run was started."""
    for spec_json in sorted(folder.glob("*/spec.json")):
        run = RunDir(spec_json.parent)
        if run.spec().forecast_id == run_id and (run.last_attempt() or run.record_json.exists()):
            return run.path
    return None
