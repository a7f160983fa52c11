"""ENTRY python -m analysis.fit: the law of a set of runs, what it says about a budget, a sealed forecast, a report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from analysis.decide import Allocation, allocate, make_forecast, write_forecast
from analysis.decide.allocate import predict_with_intervals
from analysis.inference import FitResult, fit_law
from analysis.inference.fitting import DRAWS
from analysis.inference.holdout import hold_out
from analysis.laws import LAWS
from analysis.runs import Runs, load_runs
from analysis.show.text import fit_text, forecast_text, hold_out_text
from scaling.accounting import PARAMS_CONVENTIONS
from scaling.errors import InputError, run_command
from scaling.sweepdir import check_writable

DEFAULT_SWEEP = Path(__file__).resolve().parents[1] / "sweeps" / "demo"
DEFAULT_RATIO = 10.0
"""Budget over the largest run's compute when none is given."""

_HELP = """examples:
  python -m analysis.fit --budget 1e23                  the project's own sweep, and what it says about 1e23 FLOPs
  python -m analysis.fit --data sweeps/mine --budget 1e14 --out out/mine   forecast.json, report.html and plots
  python -m analysis.fit --data runs.csv --columns n_params=size,loss=val --law chinchilla
  python -m analysis.fit --data sweeps/mine --hold-out  fit all but the top budget and see how far the forecast was off

The extrapolation ratio is the budget over the largest run: green up to 30×, amber up to 300×, red above."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.fit",
        description="Fit a scaling law to runs: parameters with intervals, compute-optimal N and D, a forecast, a report.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="PATH", help="sweep directory, .csv, .parquet or .jsonl (default: sweeps/demo)")
    add(
        "--columns",
        metavar="NAME=COL,…",
        help="which column is n_params, n_tokens, flops, loss; any two of the first three",
    )
    add("--law", default="auto", help=f"auto (chosen by backtest) or one of {', '.join(LAWS)}")
    add("--budget", type=float, nargs="+", action="extend", metavar="C", help="FLOPs (default: 10× the largest run)")
    add("--predict", type=Path, metavar="POINTS.csv", help="predict the loss at each row's n_params and n_tokens")
    add("--convention", default="body_head", help=f"which N counts: {' | '.join(PARAMS_CONVENTIONS)} (sweeps)")
    add(
        "--hold-out",
        nargs="?",
        const="top",
        metavar="C",
        help="fit runs up to C FLOPs (default: all but the top level)",
    )
    add("--out", type=Path, metavar="DIR", help="write forecast.json (sweeps), report.html and plots here")
    add("--json", metavar="-", choices=["-"], help="- : print one JSON object and nothing else")
    add("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    add("--draws", type=int, default=DRAWS, help=f"bootstrap refits (default {DRAWS})")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    runs = load_runs(_data(args.data), _columns(args.columns), args.convention)
    if args.draws < 2:
        raise InputError(f"--draws {args.draws}: at least 2")
    if args.hold_out is not None:
        return _hold_out(args, runs)
    fit = fit_law(runs, args.law, draws=args.draws, seed=args.seed)
    budgets = args.budget or [DEFAULT_RATIO * fit.largest_flops]
    allocations = _allocations(fit, runs, budgets)
    approaches = with_budgets(fit.approaches, budgets)
    predictions = _predictions(fit, args.predict) if args.predict else []
    if args.out is not None:
        if runs.plan is not None and len(budgets) > 1:
            raise InputError(f"--out writes one forecast: give one --budget, not {len(budgets)}")
        check_writable(args.out)
    forecast = None
    if args.out is not None and runs.plan is not None:
        forecast = write_forecast(args.out / "forecast.json", make_forecast(fit, runs, budgets[0]))
    if args.json:
        print(json.dumps(_answer(fit, runs, allocations, predictions, approaches), allow_nan=False))
    else:
        print(fit_text(fit, runs, allocations, approaches))
        for p in predictions:
            print("  N {n_params:.4g}  D {n_tokens:.4g}  loss {loss:.4f}  90% {interval_90}".format_map(p))
    if args.out is not None:
        from analysis.show.report import write_report

        report = write_report(args.out, fit, runs, forecast)
        if forecast is not None and not args.json:
            print("\n" + forecast_text(forecast, args.out / "forecast.json"))
        print(f"report: {report}", file=sys.stderr if args.json else sys.stdout)
    return 0


def _data(given: Path | None) -> Path:
    if given is None and not DEFAULT_SWEEP.exists():
        raise InputError(f"no --data, and the project's own sweep is not at {DEFAULT_SWEEP}: give --data PATH")
    return given or DEFAULT_SWEEP


def _columns(text: str | None) -> dict[str, str]:
    pairs = [item.partition("=") for item in (text or "").split(",") if item]
    for name, equals, column in pairs:
        if not (name and equals and column):
            raise InputError(f"--columns {text!r}: write it as n_params=COL,n_tokens=COL,loss=COL")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _allocations(fit: FitResult, runs: Runs, budgets: list[float]) -> list[Allocation]:
    """Every budget's allocation; none for a law without N and D, or without an optimum (the fit's warnings say so)."""
    for budget in budgets:
        if not budget > 0 or budget == float("inf"):
            raise InputError(f"--budget {budget:g}: must be a positive number of FLOPs")
    if fit.surface.on_frontier or min(fit.parameters["A"], fit.parameters["B"]) <= 0:
        return []
    family = runs.plan.family if runs.plan is not None else None
    return [allocate(fit, budget, family) for budget in budgets]


def with_budgets(approaches: dict[str, dict[str, Any]], budgets: list[float]) -> dict[str, dict[str, Any]]:
    """Each approach with its N* and D* at the budgets."""
    out = {}
    for key, value in approaches.items():
        out[key] = dict(value)
        if "reason" not in value:
            out[key]["allocations"] = [
                {
                    "budget_flops": c,
                    "n_params": value["n_coefficient"] * c ** value["n_exponent"],
                    "n_tokens": value["d_coefficient"] * c ** value["d_exponent"],
                }
                for c in budgets
            ]
    return out


def _predictions(fit: FitResult, path: Path) -> list[dict[str, Any]]:
    from analysis.runs import load_points

    out = []
    for n, d in load_points(path):
        loss, (inner, outer) = predict_with_intervals(fit, n, d)
        out.append(
            {"n_params": n, "n_tokens": d, "loss": loss, "interval_50": list(inner), "interval_90": list(outer)}
        )
    return out


def _answer(
    fit: FitResult,
    runs: Runs,
    allocations: list[Allocation],
    predictions: list[dict[str, Any]],
    approaches: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The object of DESIGN's interfaces."""
    return {
        "data": runs.source,
        "n_runs": fit.n_runs,
        "law": fit.law,
        "parameters": fit.parameters,
        "objective": fit.objective,
        "intervals_95": {name: list(pair) for name, pair in fit.intervals.items()},
        "extrapolation_ratio": max((fit.extrapolation_ratio(a.budget_flops) for a in allocations), default=None),
        "allocations": [a.to_dict() for a in allocations],
        "predictions": predictions,
        "approaches": approaches,
        "backtest": list(fit.backtest),
        "seed_noise": fit.seed_noise,
        "convention": runs.convention,
        "warnings": [*fit.warnings, *runs.notes],
    }


def _hold_out(args: argparse.Namespace, runs: Runs) -> int:
    try:
        cut = None if args.hold_out == "top" else float(args.hold_out)
    except ValueError:
        raise InputError(
            f"--hold-out {args.hold_out!r}: a number of FLOPs, or nothing for all but the top level"
        ) from None
    held = hold_out(runs, cut, args.law, args.draws)
    if args.json:
        summary = {"cut_flops": held.cut_flops, "law": held.fit.law, "rms_error_by_law": held.by_law}
        print(json.dumps({**summary, "runs": list(held.rows)}, allow_nan=False))
    else:
        print(hold_out_text(held))
    return 0


if __name__ == "__main__":
    run_command(main)
