"""ENTRY python -m analysis.design: the next runs of a sweep, as a grid file that python -m scaling.sweep trains."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from analysis.decide.design import (
    Candidates,
    Design,
    aim,
    choose_largest,
    family_candidates,
    recentred_widths,
)
from analysis.inference import fit_law
from analysis.inference.points import points
from analysis.inference.uncertainty import t_quantile
from analysis.runs import Runs, load_runs
from scaling.errors import InputError, run_command
from scaling.files import write_text
from scaling.hardware import find_device
from scaling.records import Plan
from scaling.rounds import LARGEST_SHARE

_DRAWS = 100

_HELP = """examples:
  python -m analysis.design sweeps/mine --target 3e13 --budget-flops 5e12 --out next.yaml
      the runs, for 5e12 FLOPs, that narrow the forecast at 3e13 FLOPs most
  python -m analysis.design sweeps/mine --target 3e21 --budget-hours 200 --device h100 --spend 60 --out next.yaml
      plan for 200 GPU-hours, write the cheapest runs of the plan for 60 of them; then run it again with the rest
  python -m analysis.design sweeps/mine --recentre 1e13 --widths 32,40,48,56,64 --out next.yaml
      an IsoFLOP budget's sizes, about the N* that the runs so far say

python -m scaling.sweep +grid=adaptive target_flops=C sweep.budget_flops=F calls this between its rounds."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.design",
        description="Choose the next runs of a sweep: those that lower the variance of the forecast most per cost.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sweep", type=Path, metavar="SWEEP", help="a sweep directory with finished runs")
    add("--target", type=float, metavar="C", help="FLOPs of the run to forecast")
    add("--budget-flops", type=float, metavar="F", help="exact FLOPs to plan for")
    add("--budget-hours", type=float, metavar="H", help="device hours to plan for, instead")
    add("--device", default="cpu", help="whose hours (default cpu: of one core)")
    add("--spend", type=float, metavar="F|H", help="write the cheapest runs of the plan for this much (default: all)")
    add(
        "--largest",
        type=float,
        metavar="C",
        help="FLOPs that the largest run may have (default: a quarter of the budget); half where as good",
    )
    add("--recentre", type=float, metavar="C", help="instead: an IsoFLOP budget, its sizes about the fitted N*")
    add("--widths", metavar="W,W,…", help="with --recentre: the sizes that were planned")
    add("--seeds", default="0", metavar="S,S,…", help="with --recentre: seeds of each size (default 0)")
    add("--out", type=Path, required=True, metavar="GRID.yaml", help="the grid file to write")
    add("--json", metavar="-", choices=["-"], help="- : print one JSON object and nothing else")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    for name in ("target", "budget_flops", "budget_hours", "spend", "largest", "recentre"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value:g}: must be a positive number")
    runs = load_runs(args.sweep)
    if runs.plan is None:
        raise InputError(f"{args.sweep} is not a sweep directory: a table of runs has no shapes to choose from")
    answer = _recentre(args, runs, runs.plan) if args.recentre is not None else _choose(args, runs, runs.plan)
    if args.json:
        print(json.dumps(answer, allow_nan=False))
    else:
        print(answer["summary"])
        print(f"grid: {args.out}", file=sys.stdout)
    return 0


def _choose(args: argparse.Namespace, runs: Runs, plan: Plan) -> dict[str, Any]:
    if args.target is None or (args.budget_flops is None) == (args.budget_hours is None):
        raise InputError("give --target C and exactly one of --budget-flops F and --budget-hours H (or --recentre C)")
    budget = args.budget_flops or args.budget_hours
    device = None if args.budget_flops is not None else find_device(args.device)
    fit, data = fit_law(runs, draws=_DRAWS), points(runs)
    target = aim(fit, plan, data, args.target)
    largest = args.largest
    if largest is None:
        largest = LARGEST_SHARE * (budget if device is None else budget * 3600 * device.peak(plan.runs[0].precision))
    sets = [family_candidates(fit, plan, data, budget, most, device) for most in (largest / 2, largest)]
    design, candidates = choose_largest(fit, data, sets, target, budget)
    bought = design.cheapest(candidates, args.spend or budget)
    if not bought.any():
        bought = _one(design, candidates)
    first = min(run.seed for run in plan.runs)
    lines = [
        [f"flops={s.flops!r}", f"model.width={s.shape.width}", _seeds(first + int(k), int(count))]
        for s, k, count in zip(candidates.specs, candidates.seeds_done, bought, strict=True)
        if count
    ]
    cost = float(bought @ candidates.cost)
    half = t_quantile(0.9, fit.freedom)
    unit = "FLOPs" if device is None else f"{device.name} hours"
    summary = (
        f"{int(bought.sum())} runs for {cost:.3g} {unit}, of a plan of {int(design.seeds.sum())} for {budget:.3g}; "
        f"90% interval of the mean at {args.target:.3g} FLOPs: ±{100 * half * design.sd_before:.2f}% now, "
        f"±{100 * half * design.sd_after:.2f}% expected with the whole plan (the noise of a run, "
        f"±{100 * half * fit.run_noise:.2f}%, comes on top)"
    )
    _write(args.out, "adaptive", summary, lines, args.target)
    return {
        "runs": int(bought.sum()),
        "cost": cost,
        "sd_before": design.sd_before,
        "sd_after": design.sd_after,
        "run_noise": fit.run_noise,
        "grid": str(args.out),
        "summary": summary,
    }


def _one(design: Design, candidates: Candidates) -> np.ndarray:
    """The cheapest run of the design alone: one that is dearer than what is to be spent now."""
    bought = np.zeros_like(design.seeds)
    bought[np.argmin(np.where(design.seeds > 0, candidates.cost, np.inf))] = 1
    return bought


def _recentre(args: argparse.Namespace, runs: Runs, plan: Plan) -> dict[str, Any]:
    own = _integers(args.widths or "", "--widths")
    fit = fit_law(runs, draws=2)
    widths = recentred_widths(fit, plan, args.recentre, own)
    line = [f"flops={args.recentre!r}", f"model.width={','.join(map(str, widths))}", f"seed={args.seeds}"]
    _integers(args.seeds, "--seeds")
    summary = f"budget {args.recentre:.3g}: widths {', '.join(map(str, widths))} (planned {', '.join(map(str, own))})"
    _write(args.out, "isoflop", summary, [line], None)
    return {"budget_flops": args.recentre, "widths": widths, "grid": str(args.out), "summary": summary}


def _integers(text: str, name: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{name} {text!r}: whole numbers with commas between, such as 32,40,48") from None


def _seeds(first: int, count: int) -> str:
    return f"seed={','.join(str(first + k) for k in range(count))}"


def _write(path: Path, name: str, description: str, lines: list[list[str]], target: float | None) -> None:
    """A grid file as those of conf/grid."""
    rows = [f"  - [{', '.join(json.dumps(text) for text in line)}]" for line in lines]
    head = [f"name: {name}", f"description: {json.dumps(description, ensure_ascii=False)}"]
    head += [f"target_flops: {target!r}"] if target is not None else []
    write_text(path, "\n".join([*head, "points:", *rows]) + "\n")


if __name__ == "__main__":
    run_command(main)
