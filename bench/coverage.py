"""How often the prediction intervals of `fit_law` hold what comes: simulated sweeps with a known truth.

Half of the surfaces are Chinchilla-like (α and β from .25 to .45, floor and terms near those published), half strongly
asymmetric (α/β from 2 to 4, either way). Half of the grids have 5 budgets from 1e17 to 1e21 and 15 sizes within ±8×;
the others have 4 to 6 budgets over 2 to 4 decades, 7 to 15 sizes within ±4 to ±8×, and a third of them have a centre that
is off N* by up to 3× at either end. Noise is 1% of loss; in a third of the sweeps 5% of the runs are 2 to 10% too high.
Each sweep is fitted with the defaults; the new run has 30 times the largest budget, at the true N* and D*, and noise.

python bench/coverage.py [--sweeps 600] [--jobs 2] [--seed 0] [--law auto] [--misses 10]
A share's error is its binomial standard error. Wanted: 86–94% in the 90% interval, 44–56% in the 50% one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from analysis.inference.simulate import Grid, Noise, Outcome, Surface, forecast_error, surface_through
from scaling.errors import InputError, run_command
from scaling.text import table

RATIO = 30.0
MIDDLE_FLOPS = 1e19


@dataclass(frozen=True)
class Case:
    """One simulated sweep."""

    seed: int
    family: str
    surface: Surface
    grid: Grid
    grid_kind: str
    noise: Noise


def make_case(seed: int) -> Case:
    """The sweep of that number: its surface, grid and noise."""
    rng = np.random.default_rng(seed)
    family = ("chinchilla-like", "asymmetric")[seed % 2]
    if family == "chinchilla-like":
        alpha, beta = rng.uniform(0.25, 0.45, 2)
    else:
        small = rng.uniform(0.12, 0.25)
        alpha, beta = rng.permutation([small, small * rng.uniform(2, 4)])
    surface = surface_through(
        MIDDLE_FLOPS,
        tokens_per_param=float(np.exp(rng.uniform(np.log(8), np.log(60)))),
        reducible=float(1.2 * np.exp(0.25 * rng.standard_normal())),
        floor=float(rng.uniform(1.5, 2.1)),
        alpha=float(alpha),
        beta=float(beta),
    )
    if seed // 2 % 2:
        grid, kind = Grid(tuple(np.geomspace(1e17, 1e21, 5)), 15, 8.0), "5 budgets × 15 ±8×"
    else:
        top = 10 ** rng.uniform(19, 21)
        budgets = np.geomspace(top / 10 ** rng.uniform(2, 4), top, rng.integers(4, 7))
        off = rng.random() < 1 / 3
        first, last = np.exp(rng.uniform(-np.log(3), np.log(3), 2)) if off else (1.0, 1.0)
        grid = Grid(tuple(budgets), int(rng.integers(7, 16)), float(rng.uniform(4, 8)), (float(first), float(last)))
        kind = "random, off-centre" if off else "random, centred"
    outliers = 0.05 if rng.random() < 1 / 3 else 0.0
    return Case(seed, family, surface, grid, kind, Noise(0.01, outliers))


def run_case(arguments: tuple[int, str]) -> tuple[Outcome, float]:
    """The outcome of one sweep and its seconds."""
    seed, law = arguments
    case = make_case(seed)
    start = time.perf_counter()
    cells = case.grid.cells(case.surface)
    outcome = forecast_error(
        case.surface, cells, case.noise, RATIO * cells.largest_flops, seed=seed, law=law, draws=300
    )
    return outcome, time.perf_counter() - start


def share(hits: Sequence[bool]) -> str:
    """A share with its binomial standard error, in percent."""
    p = float(np.mean(hits))
    return f"{100 * p:.1f} ± {100 * (p * (1 - p) / len(hits)) ** 0.5:.1f}"


def row(name: str, outcomes: Sequence[Outcome], seconds: Sequence[float]) -> list[str]:
    """One line of the table."""
    error = np.abs([o.error for o in outcomes])
    widths = [np.median([getattr(o, f"half_width_{level}") for o in outcomes]) for level in (50, 90)]
    n_error = [abs(o.n_error) for o in outcomes if o.n_error is not None]
    return [
        name,
        str(len(outcomes)),
        share([o.inside_50 for o in outcomes]),
        share([o.inside_90 for o in outcomes]),
        *(f"{100 * v:.2f}" for v in (error.mean(), np.quantile(error, 0.9), *widths)),
        f"{100 * np.mean([o.error for o in outcomes]):+.2f}",
        f"{np.exp(np.median(n_error)):.2f}" if n_error else "–",
        f"{np.mean(seconds):.2f}",
    ]


def main(argv: list[str]) -> None:
    """Simulate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=600, help="how many are simulated (default 600)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one BLAS thread each (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first sweep (default 0)")
    parser.add_argument("--law", default="auto", help="as in analysis.fit (default auto)")
    parser.add_argument("--misses", type=int, default=0, help="list the sweeps farthest outside their 90%% interval")
    parser.add_argument(
        "--json", metavar="-", choices=["-"], help="- : one JSON object a sweep, instead of the table"
    )
    args = parser.parse_args(argv)
    if args.sweeps < 1 or args.jobs < 1 or args.seed < 0:
        raise InputError(
            f"--sweeps {args.sweeps} --jobs {args.jobs} --seed {args.seed}: positive, the seed 0 or more"
        )
    seeds = range(args.seed, args.seed + args.sweeps)
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the new processes when they load numpy
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        work = pool.imap(run_case, [(seed, args.law) for seed in seeds])
        results = list(tqdm(work, total=args.sweeps, unit="sweep", disable=None))
    wall_s = time.perf_counter() - start
    cases = [make_case(seed) for seed in seeds]
    if args.json:
        for case, (outcome, _) in zip(cases, results, strict=True):
            print(json.dumps(as_json(case, outcome), allow_nan=False))
        return
    print(text(cases, results, args.misses))
    print(
        f"{args.sweeps} sweeps in {wall_s:.0f} s with {args.jobs} processes: {100 * wall_s / args.sweeps:.0f} s per 100"
    )


def as_json(case: Case, outcome: Outcome) -> dict[str, Any]:
    """A sweep as a flat object."""
    return {
        "seed": case.seed,
        "family": case.family,
        "grid": case.grid_kind,
        "outliers": case.noise.outliers,
        **case.surface.parameters,
        **asdict(outcome),
    }


def text(cases: Sequence[Case], results: Sequence[tuple[Outcome, float]], misses: int) -> str:
    """The table by family, outliers, grid and law, and the worst misses."""
    header = [
        "",
        "sweeps",
        "in 50%, %",
        "in 90%, %",
        "mean |error|, %",
        "its p90",
        "±50%",
        "±90%",
        "bias, %",
        "N* off, ×",
        "s",
    ]
    groups: list[tuple[str, Callable[[Case, Outcome], bool]]] = [("all", lambda c, o: True)]
    for family in ("chinchilla-like", "asymmetric"):
        groups.append((family, lambda c, o, f=family: c.family == f))
        for dirty in (False, True):
            name = f"{family}, {'outliers' if dirty else 'clean'}"
            groups.append((name, lambda c, o, f=family, d=dirty: c.family == f and (c.noise.outliers > 0) == d))
    groups += [(kind, lambda c, o, k=kind: c.grid_kind == k) for kind in dict.fromkeys(c.grid_kind for c in cases)]
    groups += [(f"law {law}", lambda c, o, n=law: o.law == n) for law in dict.fromkeys(o.law for o, _ in results)]
    rows = [header]
    for name, belongs in groups:
        chosen = [(o, s) for c, (o, s) in zip(cases, results, strict=True) if belongs(c, o)]
        if chosen:
            rows.append(row(name, *zip(*chosen, strict=True)))
    parts = [table(rows)]
    if misses:
        outside = [
            (abs(o.error) / o.half_width_90, c, o)
            for c, (o, _) in zip(cases, results, strict=True)
            if not o.inside_90
        ]
        parts.append(f"\n{len(outside)} sweeps are outside their 90% interval; the farthest")
        worst = sorted(outside, key=lambda item: -item[0])[:misses]
        lines = [["seed", "family", "grid", "outliers", "alpha", "beta", "law", "error, %", "±90%"]]
        for _, c, o in worst:
            alpha, beta = (f"{c.surface.parameters[k]:.3f}" for k in ("alpha", "beta"))
            shown = [f"{100 * o.error:+.2f}", f"{100 * o.half_width_90:.2f}"]
            lines.append([str(c.seed), c.family, c.grid_kind, f"{c.noise.outliers:g}", alpha, beta, o.law, *shown])
        parts.append(table(lines))
    return "\n".join(parts)


if __name__ == "__main__":
    run_command(main)
