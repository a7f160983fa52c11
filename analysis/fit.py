"""ENTRY python -m analysis.fit: the law of a set of runs, what it says about a budget, a sealed forecast, a report."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis import questions
from analysis.decide.answer import Answer, answer
from analysis.decide.forecast import make_forecast, write_forecast
from analysis.inference import fit_law
from analysis.inference.backtest import MEMBER_DELTA
from analysis.inference.conventions import ConventionFit, compare_conventions
from analysis.inference.diagnostics import beyond_n_and_d
from analysis.inference.fitting import DRAWS, LARGE
from analysis.inference.holdout import hold_out
from analysis.inference.repetition import fresh, repetition_of, split_repeats
from analysis.inference.solver import ROBUST, get_robust
from analysis.laws import LAWS
from analysis.laws.surface import get_law
from analysis.runs import Runs, conventions, load_points, load_runs
from analysis.runs.columns import LOSS_UNITS, PARAMS_CHOICES
from analysis.show.text import answer_text, forecast_text, hold_out_text
from scaling.accounting import FLOPS_CONVENTIONS
from scaling.errors import InputError, run_command
from scaling.sweepdir import check_writable

DEFAULT_SWEEP = Path(__file__).resolve().parents[1] / "sweeps" / "demo"
DEFAULT_RATIO = 10.0
"""Budget over the largest run's compute when none is given."""

_HELP = (
    """examples:
  python -m analysis.fit --budget 1e23                  the project's own sweep, and what it says about 1e23 FLOPs
  python -m analysis.fit --data sweeps/mine --budget 1e14 --out out/mine   forecast.json, report.html and plots
  python -m analysis.fit --data runs.csv --columns n_params=size,loss=val --law chinchilla
  python -m analysis.fit --data sweeps/mine --hold-out  fit all but the top budget and see how far the forecast was off
  python -m analysis.fit --data runs.csv --target-loss 2.4   the cheapest compute that reaches a loss
  python -m analysis.fit --data runs.csv --usd 1e6 --device h100 --served-tokens 2e12 --serve-mfu .05   a budget for its whole life
  python -m analysis.fit --data runs.csv --budget 1e23 --serve-memory-gb 80 --unique-tokens 3e11        what one GPU serves, on one's own text

N: parameters; D: training tokens; C: training FLOPs, about 6·N·D; N* and D*: the size and the tokens of the least loss for C.

How to read the answer, in its order:
  law           its parameters with 95% intervals, to compare with the literature; "not identified": the runs do not say
  run noise     how far runs lie from the law, and seeds of one run from each other; starts: how many of the solver's came
                to this minimum; condition: above 1e5, single parameters mean little
  forecast      a mean of laws weighed by backtest, unless --law asks for one; k is how much more the larger runs count; the
                intervals hold parameter, seed and law-form uncertainty and widen with the distance; they are right where the
                law goes on as in these runs, and held 35% and 78% (for 50% and 90%) on published runs held out
  extrapolation the budget over the largest run's compute: green up to 30x, amber up to 300x, red above
  approaches    Chinchilla's three: the best run of each compute, a parabola through each budget, the law's optimum; far
                apart, they say that N* is not known. Wasted compute: what following each would cost if the forecast is true
  published     what the laws of others say about the same budget; their losses are of other data
  backtest      what the runs below each cut said of those above: the error to expect; read it before the parameters
  conventions   the exponents, a of N* ∝ C^a among them, under every way of counting N and C; compare published ones under
                the same way only
  diagnostics   runs that stand out. A mis-tuned run lies above the law. Find out why before --drop RUN_ID leaves it out

"""
    + questions.HELP
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.fit",
        description="Fit a scaling law to runs: parameters with intervals, compute-optimal N and D, a forecast, a report.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = parser.add_argument_group("the runs")
    add = data.add_argument
    add(
        "--data",
        type=Path,
        metavar="PATH",
        help="sweep directory, .csv, .tsv, .parquet or .jsonl (default: sweeps/demo)",
    )
    add(
        "--columns",
        metavar="NAME=COL,…",
        help="which column is n_params, n_tokens, flops, loss, where their names are not usual ones; any two of the first three",
    )
    add(
        "--convention",
        default="body_head",
        help=f"which parameters N counts: {' | '.join(PARAMS_CHOICES)} (default body_head: layers and output head)",
    )
    add(
        "--flops",
        help=f"which FLOPs C counts: {' | '.join(FLOPS_CONVENTIONS)} (default: exact in a sweep, causal attention included; as "
        "given in a file)",
    )
    add(
        "--loss-unit",
        metavar="UNIT",
        help=f"what the loss is in: {' | '.join(LOSS_UNITS)} (default: by its column's name)",
    )
    add(
        "--vocab-size", type=int, metavar="V", help="of a file with width and total N, for --convention non_embedding"
    )
    add("--checkpoints", choices=["last", "all"], help="of rows that share a run_id, which count (default: last)")
    add("--drop", metavar="RUN_ID,…", help="leave these runs out; the answer and the forecast record it")
    fit = parser.add_argument_group("the fit")
    add = fit.add_argument
    add("--law", default="auto", help=f"auto (several, weighed by backtest) or one of {', '.join(LAWS)}")
    add(
        "--loss",
        default="huber",
        help=f"of the residuals of ln loss, in every fit but approaches 1 and 2: {' | '.join(ROBUST)} (default huber; asymmetric: "
        "runs above the law, as mis-tuned ones are, pull a quarter as much). Quadratic up to δ = 1e-3 for the parameters shown "
        f"and a law asked for by name, up to {MEMBER_DELTA:g} for the laws that share the forecast of --law auto",
    )
    add("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    add("--draws", type=int, default=DRAWS, help=f"bootstrap refits (default {DRAWS})")
    asked = parser.add_argument_group("what is asked")
    add = asked.add_argument
    add(
        "--budget",
        type=float,
        nargs="+",
        action="extend",
        metavar="C",
        help="training compute asked about, in FLOPs; several: a row each (default: 10x the largest run's)",
    )
    add("--target-loss", type=float, metavar="L", help="the cheapest compute that reaches this loss")
    add("--predict", type=Path, metavar="POINTS.csv", help="predict the loss at each row's n_params and n_tokens")
    add(
        "--hold-out",
        nargs="?",
        const="top",
        metavar="C",
        help="instead: fit the runs up to C FLOPs (default: all but the top level) and compare the forecast of the others",
    )
    questions.add_arguments(parser)
    out = parser.add_argument_group("output")
    add = out.add_argument
    add("--out", type=Path, metavar="DIR", help="write forecast.json (sweeps), report.html and plots here")
    add("--json", metavar="-", choices=["-"], help="- : print one JSON object and nothing else")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    robust = get_robust(args.loss)
    more = beyond_n_and_d(get_law(args.law)) if args.law != "auto" else []
    if more and (args.hold_out is not None or args.out is not None):
        raise InputError(
            f"--law {args.law} needs {', '.join(more)} beside N and D: --hold-out and --out take other laws"
        )
    questions.check(args)
    if args.draws < 2:
        raise InputError(f"--draws {args.draws}: at least 2")
    path, columns = _data(args.data), _columns(args.columns)
    dropped = [run_id.strip() for run_id in (args.drop or "").split(",") if run_id.strip()]
    runs = load_runs(path, columns, args.convention, args.flops, args.loss_unit, args.vocab_size, args.checkpoints)
    everything = drop(runs, dropped)
    runs, worth = split_repeats(everything, args.law, robust)
    if args.hold_out is not None:
        return _hold_out(args, runs)
    if args.out is not None and runs.plan is not None and len(args.budget or [0]) > 1:
        raise InputError(f"--out writes one forecast: give one --budget, not {len(args.budget)}")
    at = load_points(args.predict) if args.predict else []
    fit = fit_law(runs, args.law, draws=args.draws, seed=args.seed, robust=robust)
    budgets = questions.budgets(args, DEFAULT_RATIO * fit.largest_flops)
    counted: tuple[ConventionFit, ...] = ()
    if len(runs) <= LARGE and not fit.surface.on_frontier:
        parts = conventions(path, columns, args.loss_unit, args.vocab_size, args.checkpoints)
        same = (drop(part, dropped) for part in parts)
        counted = compare_conventions(map(fresh, same) if len(runs) < len(everything) else same, budgets[0], robust)
    said = answer(
        fit,
        runs,
        budgets,
        robust=robust,
        target_loss=args.target_loss,
        at=at,
        conventions=counted,
        dropped=dropped,
        limits=questions.limits(args, fit, runs, worth or repetition_of(fit)),
    )
    said = questions.with_experts(args, questions.priced(args, said))
    _write(args, said)
    return 0


def drop(runs: Runs, run_ids: Sequence[str]) -> Runs:
    """The runs without some, which its notes name.

    Raises:
        InputError: an id that no run has, or none left.
    """
    if not run_ids:
        return runs
    ids = runs.table["run_id"].astype(str)
    for run_id in run_ids:
        if not (ids == run_id).any():
            near = difflib.get_close_matches(run_id, ids[:LARGE], n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"--drop {run_id!r}: no such run in {runs.source}; {hint}its ids start {', '.join(ids[:3])}"
            )
    table = runs.table[~ids.isin(run_ids)].reset_index(drop=True)
    if table.empty:
        raise InputError(f"--drop leaves none of the {len(runs)} runs")
    note = f"left out by --drop: {', '.join(run_ids)}"
    return dataclasses.replace(runs, table=table, notes=(*runs.notes, note))


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


def _write(args: argparse.Namespace, said: Answer) -> None:
    """Forecast, report, and the answer on stdout."""
    forecast = None
    if args.out is not None:
        check_writable(args.out)
    if args.out is not None and said.runs.plan is not None:
        made = make_forecast(said.fit, said.runs, said.budgets[0], limits=said.limits)
        forecast = write_forecast(args.out / "forecast.json", made)
    if args.json:
        print(json.dumps(said.to_dict(), allow_nan=False))
    else:
        print(answer_text(said, colour=sys.stdout.isatty()))
    if args.out is not None:
        from analysis.show.report import write_report

        report = write_report(args.out, said.fit, said.runs, forecast, said=said)
        if forecast is not None and not args.json:
            print("\n" + forecast_text(forecast, args.out / "forecast.json"))
        print(f"report: {report}", file=sys.stderr if args.json else sys.stdout)


def _hold_out(args: argparse.Namespace, runs: Runs) -> int:
    try:
        cut = None if args.hold_out == "top" else float(args.hold_out)
    except ValueError:
        raise InputError(
            f"--hold-out {args.hold_out!r}: a number of FLOPs, or nothing for all but the top level"
        ) from None
    held = hold_out(runs, cut, args.law, args.draws, get_robust(args.loss))
    if args.json:
        print(json.dumps(held.to_dict(), allow_nan=False))
    else:
        print(hold_out_text(held))
    return 0


if __name__ == "__main__":
    run_command(main)
