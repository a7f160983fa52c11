"""The sealed forecast of one run: what to train with a budget, and the loss it will come to."""

from __future__ import annotations

import dataclasses
import datetime
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from analysis.decide.allocate import best_width, family_flops_per_token, predict_with_intervals
from analysis.inference import FitResult
from analysis.inference.uncertainty import t_quantile
from analysis.laws.law import Floats
from analysis.runs import Runs
from scaling.accounting import ParamsConvention, count_params
from scaling.config import to_dict
from scaling.errors import InputError
from scaling.records import CurvePoint, Forecast, Plan
from scaling.spec import RunSpec
from scaling.sweepdir import RunDir, SweepDir

AMBER_FROM, RED_FROM = 30.0, 300.0
"""Extrapolation ratios above which a forecast is marked amber, red (Chinchilla went 192×, Llama 3 3,800×)."""

_VOLATILE = ("created", "seal")
_LEAST_CURVES = 4


def extrapolation_colour(ratio: float) -> Literal["green", "amber", "red"]:
    """≤ 30× green, ≤ 300× amber, more red."""
    return "green" if ratio <= AMBER_FROM else "amber" if ratio <= RED_FROM else "red"


def make_forecast(fit: FitResult, runs: Runs, budget_flops: float, seed: int | None = None) -> Forecast:
    """Forecast the run that spends `budget_flops` best among the sweep's family of shapes.

    The shape is the best width whose D/N lies in the range that the sweep measured; the recipe, data, optimizer,
    schedule and evaluation are the plan's. Equal inputs give an equal forecast, `created` and seal apart.

    Args:
        runs: of a sweep directory; what `fit` was fitted on.
        seed: of the flagship; that of the largest run when None.
    Raises:
        InputError: runs that come from no sweep, or are counted otherwise than the engine counts (exact FLOPs, nats per
            token), or a budget below one batch.
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
    spec, notes = _flagship(fit, plan, runs, budget_flops, seed)
    n = count_params(spec.shape).count(_params(fit))
    loss, (inner, outer) = predict_with_intervals(fit, n, spec.tokens)
    n_star, d_star = fit.allocate(budget_flops, family_flops_per_token(plan.family, _params(fit)))
    ratio = fit.extrapolation_ratio(spec.flops)
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
        curve=_curve(fit, runs, spec, loss),
        extrapolation_ratio=ratio,
        extrapolation_colour=extrapolation_colour(ratio),
        notes=[*fit.warnings, *runs.notes, *extrapolation_warnings(fit, ratio), *notes],
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
    fit: FitResult, plan: Plan, runs: Runs, budget_flops: float, seed: int | None
) -> tuple[RunSpec, list[str]]:
    """The RunSpec of the budget, and remarks on it."""
    from scaling.grid import make_run
    from scaling.recipe import recipe_from_dict

    fitted = set(fit.run_ids)
    largest = max((s for s in plan.runs if s.run_id in fitted), key=lambda s: (s.flops, -s.seed), default=None)
    if largest is None:
        raise InputError(f"{runs.source}: none of the fitted runs is in the sweep's plan.json")
    per_param = (runs.table["n_tokens"] / runs.table["n_params"]).to_numpy(float)
    width = best_width(fit, plan.family, budget_flops, (float(per_param.min()), float(per_param.max())))
    spec = make_run(
        plan.family,
        width,
        flops=budget_flops,
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
    epochs = spec.tokens / plan.data.train_tokens
    if epochs > spec.data.max_epochs:
        notes.append(
            f"the run would read the corpus {epochs:.3g} times (limit {spec.data.max_epochs:g}): it needs more text, "
            "and the law was measured on fresh tokens"
        )
    return spec, notes


def _curve(fit: FitResult, runs: Runs, spec: RunSpec, final_loss: float) -> list[CurvePoint]:
    """Held-out loss along the run with its band; empty when fewer than four runs have their metrics at hand.

    For each fraction f of a run g(f) = ln(loss at f / final loss) is regressed on ln C over the sweep and read at the
    target; the band adds the regression's prediction variance to the final loss's.
    """
    sweep = SweepDir(Path(runs.source))
    curves, log_flops = [], []
    for run_id, flops in zip(runs.table["run_id"], runs.table["flops"], strict=True):
        curve = _relative_curve(sweep.run(str(run_id)))
        if curve is not None:
            curves.append(curve)
            log_flops.append(math.log(flops))
    if len(curves) < _LEAST_CURVES:
        return []
    x, target = np.array(log_flops), math.log(spec.flops)
    n = count_params(spec.shape).count(_params(fit))
    final_sd = float(fit.predictive_sd(n, spec.tokens))
    points = []
    for k in range(1, spec.eval.points + 1):
        fraction = k / spec.eval.points
        here = [(xi, np.interp(fraction, f, g)) for xi, (f, g) in zip(x, curves, strict=True) if f[0] <= fraction]
        if len(here) < _LEAST_CURVES:
            continue
        lift, sd = _linear_forecast(np.array([h[0] for h in here]), np.array([h[1] for h in here]), target)
        total = math.hypot(sd, final_sd)
        loss = final_loss * math.exp(lift)
        bands = []
        for level in (0.5, 0.9):
            half = t_quantile(level, fit.freedom) * total
            bands.append((loss * math.exp(-half), loss * math.exp(half)))
        points.append(CurvePoint(round(fraction * spec.tokens), loss, bands[0], bands[1]))
    return points


def _relative_curve(run: RunDir) -> tuple[Floats, Floats] | None:
    """(fraction of the run, ln(held-out loss / its final value)) at a run's evaluations."""
    rows = [(r["tokens"], r["val_loss"]) for r in run.metrics() if r.get("val_loss")]
    if len(rows) < 2:
        return None
    tokens, loss = np.array(rows, float).T
    return tokens / tokens[-1], np.log(loss / loss[-1])


def _linear_forecast(x: Floats, y: Floats, at: float) -> tuple[float, float]:
    """Least-squares line through (x, y) read at `at`: value and standard deviation of a new observation there."""
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ y) / spread if spread > 1e-9 else 0.0
    residual = y - y.mean() - slope * centred
    variance = float(residual @ residual) / max(len(x) - 2, 1)
    leverage = 1 / len(x) + ((at - x.mean()) ** 2 / spread if spread > 1e-9 else 0.0)
    return float(y.mean() + slope * (at - x.mean())), math.sqrt(variance * (1 + leverage))


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
        started = _started(path.parent, existing.spec.run_id)
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
        if run.spec().run_id == run_id and (run.last_attempt() or run.record_json.exists()):
            return run.path
    return None
