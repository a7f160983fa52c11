"""ENTRY: hold a finished flagship against its sealed forecast, and fit the law again with the new point."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.decide.outcome import MOVED, Checked, Kept, calibration, check
from scaling.errors import InputError, run_command
from scaling.files import write_json
from scaling.records import Forecast, RunRecord
from scaling.sweepdir import RunDir, check_writable
from scaling.text import readable_time

if TYPE_CHECKING:
    from analysis.inference import FitResult
    from analysis.inference.solver import Robust
    from analysis.runs import Runs
    from analysis.show.report import Outcome

NEXT_FACTOR = 10
"""The next target's compute over the flagship's."""


def find_forecast(run: Path, given: Path | None) -> Path:
    """The forecast of a run: `given`, else forecast.json in the run's folder, else beside that folder.

    Raises:
        InputError: none there.
    """
    if given is not None:
        return given
    places = [run / "forecast.json", run.resolve().parent / "forecast.json"]
    for place in places:
        if place.exists():
            return place
    raise InputError(f"no forecast.json in {places[0].parent} or {places[1].parent}: name it with --forecast PATH")


def read_flagship(run: Path, forecast: Forecast) -> RunRecord:
    """The record of the finished run that the forecast is about.

    Raises:
        InputError: no run there, not finished, diverged or failed, another run than the forecast's, or one that was
            started on another forecast (the flagship keeps a copy of the one it was started on).
    """
    folder = RunDir(run)
    if not folder.spec_json.exists() and not folder.record_json.exists():
        raise InputError(f"{run} is not a run's folder: it has neither spec.json nor record.json")
    record = folder.record()
    if record is None:
        raise InputError(f"run {run} has not finished: python -m train.flagship forecast=PATH goes on with it")
    if record.status != "ok" or record.loss is None:
        raise InputError(f"run {run} {record.status} ({record.reason or 'no reason recorded'}): it has no final loss")
    if record.spec.forecast_id != forecast.spec.forecast_id:
        raise InputError(
            f"run {run} is {record.run_id}, the forecast is about {forecast.spec.run_id}: "
            "give the flagship of this forecast, or its own forecast with --forecast PATH"
        )
    kept = run / "forecast.json"
    if kept.exists() and (seal := Forecast.read(kept).seal) != forecast.seal:
        raise InputError(
            f"run {run} was started on the forecast sealed {seal[:12]}…, this one's seal is {forecast.seal[:12]}…: "
            f"only {kept} was made before the run"
        )
    return record


def compare(forecast: Forecast, actual_loss: float) -> dict[str, Any]:
    """The object of postmortem.json. relative_error = forecast / actual − 1, so above 0: the run did better."""

    def inside(interval: tuple[float, float]) -> bool:
        return interval[0] <= actual_loss <= interval[1]

    return {
        "forecast_loss": forecast.loss,
        "actual_loss": actual_loss,
        "relative_error": forecast.loss / actual_loss - 1,
        "inside_50": inside(forecast.interval_50),
        "inside_90": inside(forecast.interval_90),
        "extrapolation_ratio": forecast.extrapolation_ratio,
        "seal_ok": forecast.seal == forecast.computed_seal(),
    }


def find_sweep(forecast: Forecast, path: Path) -> Path | None:
    """The sweep that the forecast at `path` was made from, if it is still where the forecast says.

    Its path is tried from here, from the forecast's folder, and from the folder above (for the copy in a run's folder).
    """
    home = path.resolve().parent
    for base in (Path(), home, home.parent):
        if (base / forecast.sweep).exists():
            return base / forecast.sweep
    return None


def fitted_runs(forecast: Forecast, sweep: Path) -> Runs:
    """The runs that the forecast was fitted on, read again.

    Raises:
        InputError: the sweep no longer has all of them.
    """
    from analysis.runs import load_runs

    runs = load_runs(sweep, convention=forecast.convention.get("params", "body_head"))
    table = runs.table[runs.table["run_id"].isin(forecast.run_ids)]
    if lost := sorted(set(forecast.run_ids) - set(table["run_id"])):
        raise InputError(f"sweep {sweep} has lost {len(lost)} of the forecast's runs ({', '.join(lost[:3])} …)")
    return dataclasses.replace(runs, table=table.reset_index(drop=True))


def with_flagship(runs: Runs, record: RunRecord, worth: tuple[float, float] | None = None) -> Runs:
    """The runs and the flagship, counted in the runs' convention.

    Args:
        worth: N and D that it was worth, where it repeated its text; its own when None.
    """
    import pandas as pd

    n, d = worth or (record.params[runs.convention["params"]], record.tokens)
    row = {
        "run_id": record.run_id,
        "status": record.status,
        "n_params": n,
        "n_tokens": d,
        "flops": record.flops["exact"],
        "loss": record.loss,
        "seed": record.spec.seed,
        "width": record.spec.shape.width,
        "depth": record.spec.shape.depth,
        "peak_lr": record.spec.optim.peak_lr,
        "batch_tokens": record.spec.batch_tokens,
    }
    kept = {name: [value] for name, value in row.items() if name in runs.table}
    return dataclasses.replace(runs, table=pd.concat([runs.table, pd.DataFrame(kept)], ignore_index=True))


def next_target(before: FitResult, after: FitResult, runs: Runs, flops: float) -> dict[str, Any]:
    """Loss at `flops`, at the refitted law's compute-optimal N and D, as both laws forecast it."""
    import numpy as np

    from analysis.show.plots import frontier

    n, d = (float(value[0]) for value in frontier(after, runs.table, np.array([flops])))
    out: dict[str, Any] = {"flops": flops, "n_params": n, "n_tokens": d}
    for key, fit in (("_before", before), ("", after)):
        out[f"loss{key}"] = float(fit.predict(n, d))
        out[f"interval_90{key}"] = tuple(float(side) for side in fit.predict_interval(n, d, 0.9))
    return out


def fitted_as(forecast: Forecast) -> tuple[str, Robust]:
    """The law and loss of residuals that `analysis.fit` was asked for: "auto" for several laws, or one that emphasises
    the larger runs."""
    from analysis.inference.solver import HUBER, get_robust

    used = forecast.laws[0]
    several = len(forecast.laws) > 1 or used.get("emphasis") is not None
    return "auto" if several else used["name"], get_robust(used.get("loss", HUBER.name))


def refit(run: Path, forecast: Forecast, record: RunRecord, sweep: Path) -> tuple[FitResult, Runs, Outcome]:
    """The law as it was, the runs it was fitted on, and the outcome with the law fitted on them and the flagship."""
    import numpy as np

    from analysis.decide.allocate import flops_per_token_of
    from analysis.decide.limits import Limits
    from analysis.decide.optimum import Search
    from analysis.inference import fit_law
    from analysis.show.report import Outcome

    assert record.loss is not None
    runs = fitted_runs(forecast, sweep)
    law, robust = fitted_as(forecast)
    before = fit_law(runs, law=law, robust=robust)
    worth = None
    if "unique_tokens" in forecast.limits:
        family = runs.plan.family if runs.plan is not None else None
        search = Search(before, flops_per_token_of(before, family), Limits(**forecast.limits))
        counted = record.params[runs.convention["params"]], record.tokens
        n, d = search.worth(*(np.array(x, float) for x in counted))
        worth = float(n), float(d)
    after = fit_law(with_flagship(runs, record, worth), law=law, robust=robust)
    target = next_target(before, after, runs, NEXT_FACTOR * record.flops["exact"])
    return before, runs, Outcome(compare(forecast, record.loss), RunDir(run).metrics(), str(run), after, target)


def _summary_text(forecast: Forecast, summary: dict[str, Any]) -> str:
    from analysis.show.numbers import interval, percent

    inside = (
        "inside the 50%" if summary["inside_50"] else "inside the 90%" if summary["inside_90"] else "outside the 90%"
    )
    return (
        f"forecast   {forecast.loss:.4f} nats per token   50% {interval(forecast.interval_50, 4)}   "
        f"90% {interval(forecast.interval_90, 4)}\n"
        f"actual     {summary['actual_loss']:.4f} nats per token   {inside} interval\n"
        f"error      {percent(summary['relative_error'])} (forecast over actual, less one)\n"
        f"reach      {forecast.extrapolation_ratio:.1f}× the largest run's compute ({forecast.extrapolation_colour}); "
        f"sealed {forecast.created}, seal {forecast.seal[:12]}… intact"
    )


def _refit_text(before: FitResult, outcome: Outcome) -> str:
    from analysis.show.numbers import flops, interval, si

    after, target = outcome.refit, outcome.next_target
    assert after is not None
    laws = " → ".join(dict.fromkeys((before.law, after.law)))
    lines = [f"{'law ' + laws:<24} {'before':>12} {'with the flagship':>20}"]
    lines += [
        f"{name:<24} {value:>12.5g} {after.parameters[name]:>20.5g}" for name, value in before.parameters.items()
    ]
    lines += [
        f"\nnext, {flops(target['flops'])} FLOPs with {si(target['n_params'])} parameters on "
        f"{si(target['n_tokens'])} tokens:",
        f"  before              {target['loss_before']:.4f}   90% {interval(target['interval_90_before'], 4)}",
        f"  with the flagship   {target['loss']:.4f}   90% {interval(target['interval_90'], 4)}",
    ]
    return "\n".join(lines)


def _checked_text(checked: Checked) -> str:
    """Curve, speed, cost, and what moved."""
    from analysis.show.numbers import percent, share

    lines = []
    if checked.curve is not None:
        c = checked.curve
        lines.append(
            f"curve      {c.points} evaluations, mean error {100 * c.mean_abs_error:.2f}%; {share(c.inside_50)} inside the 50% "
            f"band, {share(c.inside_90)} inside the 90% band"
        )
    if checked.spent is not None:
        t = checked.spent
        lines.append(
            f"spent      {readable_time(t.actual_s)} ({readable_time(t.planned_s)} planned, {t.ratio:.2f}×), "
            f"{t.tokens_per_s:,.0f} tokens/s, {t.actual_usd:.2g} USD ({t.planned_usd:.2g} planned)"
        )
    moved = [a for a in checked.assumptions if a.moved]
    shown = moved or checked.assumptions[:1]
    said = "; ".join(f"{a.name} {percent(a.deviation, 1)} (z {a.z:+.1f})" for a in shown[:4])
    lines.append(f"moved      {said}" if moved else f"moved      nothing; furthest: {said}")
    if checked.spent is not None and not 1 / MOVED < checked.spent.ratio < MOVED:
        lines.append(f"           and the speed: {checked.spent.ratio:.2f}× the planned time")
    return "\n".join(lines)


def _record_text(kept: Sequence[Kept]) -> str:
    """The calibration record: a line a forecast, then how often the intervals held."""
    from analysis.show.numbers import percent
    from analysis.show.text import table

    rows = [
        (
            k.path,
            f"{k.extrapolation_ratio:.1f}×",
            f"{k.forecast_loss:.4f}",
            f"{k.actual_loss:.4f}",
            percent(k.relative_error),
            "yes" if k.inside_50 else "no",
            "yes" if k.inside_90 else "no",
        )
        for k in kept
    ]
    header = ["sealed forecast", "reach", "forecast", "actual", "error", "in 50%", "in 90%"]
    said = _calibration(kept)
    return (
        f"{table(header, rows)}\n  {said['n']} forecasts: mean absolute error {100 * said['mean_absolute_error']:.2f}%; "
        f"{said['inside_50']} inside 50%, {said['inside_90']} inside 90%"
    )


def _calibration(kept: Sequence[Kept]) -> dict[str, Any]:
    return {
        "n": len(kept),
        "mean_absolute_error": sum(abs(k.relative_error) for k in kept) / len(kept),
        "inside_50": sum(k.inside_50 for k in kept),
        "inside_90": sum(k.inside_90 for k in kept),
        "forecasts": [vars(k) for k in kept],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.postmortem",
        description="Forecast against fact: how far the flagship's loss is from its sealed forecast, whether it fell in "
        "the intervals, and the law fitted again with the new point.",
        epilog="Writes postmortem.json, and, where the forecast's sweep is at hand, report.html and plots/. With a folder "
        "above several runs instead: the calibration record of all sealed forecasts in it, nothing written.",
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="the flagship's run folder (the one with record.json), or a folder above several",
    )
    parser.add_argument("--forecast", type=Path, help="default: forecast.json in the run's folder, or beside it")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: the run's folder")
    parser.add_argument(
        "--json", metavar="-", choices=["-"], help="- : print the object of postmortem.json, nothing else"
    )
    return parser


def _is_above_runs(path: Path) -> bool:
    """Whether this is a folder that is no run's and has runs' records somewhere in it."""
    run = RunDir(path)
    alone = not run.spec_json.exists() and not run.record_json.exists()
    return path.is_dir() and alone and any(path.rglob("forecast.json"))


def main(argv: list[str]) -> None:
    """Compare, refit where the sweep is at hand, write and print."""
    args = _parser().parse_args(argv)
    if _is_above_runs(args.run):
        kept = calibration(args.run)
        print(json.dumps(_calibration(kept)) if args.json else _record_text(kept))
        return
    path = find_forecast(args.run, args.forecast)
    forecast = Forecast.read(path)
    record = read_flagship(args.run, forecast)
    assert record.loss is not None
    out = args.out or args.run
    check_writable(out)

    checked = check(forecast, record, RunDir(args.run).metrics())
    summary = {**compare(forecast, record.loss), **checked.to_dict(), "next": None}
    sweep = find_sweep(forecast, path)
    said, written = [f"{_summary_text(forecast, summary)}\n{_checked_text(checked)}"], [out / "postmortem.json"]
    if sweep is None:
        said.append(f"the forecast's sweep {forecast.sweep} is not here: no refit, no report")
    else:
        from analysis.show.report import write_report

        before, runs, outcome = refit(args.run, forecast, record, sweep)
        summary["next"] = outcome.next_target
        said.append(_refit_text(before, outcome))
        outcome = dataclasses.replace(outcome, summary=summary)
        written += [write_report(out, before, runs, forecast, outcome), out / "plots"]
    write_json(out / "postmortem.json", summary)
    said.append("wrote " + ", ".join(map(str, written)))
    print(json.dumps(summary) if args.json else "\n\n".join(said))


if __name__ == "__main__":
    run_command(main)
