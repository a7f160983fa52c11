"""Adaptive design against an IsoFLOP grid of equal FLOPs: the 90% interval of the forecast on simulated surfaces.

The surfaces are those of bench/coverage.py: half Chinchilla-like, half asymmetric; noise is 1% of loss. The IsoFLOP grid has 5
budgets from 1e19 to 1e21 FLOPs and 9 sizes within ±4× of the true N*. The adaptive sweep starts with a tenth of those FLOPs on
such a grid of 5 × 7 from 1e18 to 1e20, then buys what `choose_runs` says in two rounds, no run dearer than a quarter of
the whole. Both forecast the loss at the true N* and D* of 3e22 FLOPs, 30 times the grid's largest run, by `fit_law`.
"interval of the mean": of the predicted loss, without the noise of the run that comes, which no sweep can lower;
"of a new run": as analysis.fit prints it. Coverage: of the true loss, and of a new run's.

python bench/design.py [--surfaces 200] [--jobs 1] [--seed 0]
Wanted: the interval at least 30% narrower in the median, 86–94% of new runs inside.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from coverage import make_case, share
from tqdm import tqdm

from analysis.decide.design import Candidates, aim, choose_runs, levels
from analysis.inference.fitting import fit_law
from analysis.inference.points import points
from analysis.inference.simulate import Cells, Grid, Noise, Surface, simulate
from analysis.inference.uncertainty import t_quantile
from analysis.runs import Runs
from scaling.errors import InputError, run_command
from scaling.rounds import LARGEST_SHARE
from scaling.text import table

TARGET_FLOPS = 3e22
ISOFLOP = Grid(tuple(np.geomspace(1e19, 1e21, 5)), 9, 4.0)
PILOT = Grid(tuple(np.geomspace(1e18, 1e20, 5)), 7, 4.0)
ROUNDS = 2
NOISE = Noise(0.01)
SIZES_A_DECADE = 10
DRAWS, ROUND_DRAWS = 200, 20


@dataclass(frozen=True)
class Result:
    """What one sweep said about the target."""

    runs: int
    flops: float
    largest_flops: float
    half_mean: float
    """Half-width of ln of the 90% interval of the mean."""
    half_new: float
    """Of a new run."""
    mean_inside: bool
    new_inside: bool
    error: float
    """ln(predicted / true)."""
    run_noise: float


def judge(surface: Surface, runs: Runs, seed: int) -> Result:
    """Fit a sweep and hold its forecast against the truth and against one new run."""
    fit = fit_law(runs, draws=DRAWS, seed=seed)
    n, d = surface.optimum(TARGET_FLOPS)
    error = float(np.log(fit.predict(n, d) / surface.loss(n, d)))
    new = NOISE.sd * np.random.default_rng([seed, 1]).standard_normal()
    t, sd = t_quantile(0.9, fit.freedom), float(fit.predictive_sd(n, d))
    half_new, half_mean = t * sd, t * float(np.sqrt(max(sd**2 - fit.run_noise**2, 0.0)))
    return Result(
        runs=len(runs),
        flops=float(runs.table["flops"].sum()),
        largest_flops=fit.largest_flops,
        half_mean=half_mean,
        half_new=half_new,
        mean_inside=abs(error) <= half_mean,
        new_inside=abs(error - new) <= half_new,
        error=error,
        run_noise=fit.run_noise,
    )


def adaptive_sweep(surface: Surface, budget_flops: float, seed: int) -> Runs:
    """A pilot, then rounds of chosen runs, until the budget is spent."""
    runs = simulate(surface, PILOT.cells(surface), NOISE, [seed, 2])
    ratio = runs.table["n_tokens"] / runs.table["n_params"]
    flops, n = np.meshgrid(levels(LARGEST_SHARE * budget_flops, 1e18), 10 ** np.arange(5, 14, 1 / SIZES_A_DECADE))
    d = flops / 6 / n
    legal = (d / n >= ratio.min()) & (d / n <= ratio.max())
    n, d, flops = n[legal], d[legal], flops[legal]
    done = np.zeros(len(n), int)
    for k in range(ROUNDS):
        fit, data = fit_law(runs, draws=ROUND_DRAWS, seed=seed), points(runs)
        left = budget_flops - float(runs.table["flops"].sum())
        candidates = Candidates(n, d, flops, flops, done)
        design = choose_runs(fit, data, candidates, aim(fit, None, data, TARGET_FLOPS), left)
        bought = design.cheapest(candidates, left / (ROUNDS - k))
        rows = np.repeat(np.arange(len(n)), bought)
        number = np.concatenate([np.arange(done[i], done[i] + bought[i]) for i in np.flatnonzero(bought)])
        new = simulate(surface, Cells(n[rows], d[rows], flops[rows], number), NOISE, [seed, 3 + k])
        new.table["run_id"] = [f"round {k} {i}" for i in range(len(rows))]
        done = done + bought
        runs = dataclasses.replace(runs, table=pd.concat([runs.table, new.table], ignore_index=True))
    return runs


def run_case(seed: int) -> tuple[str, Result, Result]:
    """The family of the surface of that number; what the IsoFLOP grid and the adaptive sweep say about it."""
    case = make_case(seed)
    grid = simulate(case.surface, ISOFLOP.cells(case.surface), NOISE, [seed, 0])
    adaptive = adaptive_sweep(case.surface, float(grid.table["flops"].sum()), seed)
    return case.family, judge(case.surface, grid, seed), judge(case.surface, adaptive, seed)


def row(name: str, results: Sequence[Result]) -> list[str]:
    """One line of the table."""
    median = {f.name: float(np.median([getattr(r, f.name) for r in results])) for f in dataclasses.fields(Result)}
    return [
        name,
        f"{median['runs']:.0f}",
        f"{median['flops']:.3g}",
        f"{TARGET_FLOPS / median['largest_flops']:.3g}",
        *(f"{100 * median[key]:.2f}" for key in ("half_mean", "half_new")),
        share([r.mean_inside for r in results]),
        share([r.new_inside for r in results]),
        f"{100 * np.mean([abs(r.error) for r in results]):.2f}",
        f"{100 * median['run_noise']:.2f}",
    ]


def text(cases: Sequence[tuple[str, Result, Result]]) -> str:
    """The table, all surfaces and by family, and the ratios of the widths."""
    header = [
        "design",
        "runs",
        "FLOPs",
        "×",
        "±90% mean",
        "±90% new",
        "true in, %",
        "new in, %",
        "|error|, %",
        "noise, %",
    ]
    parts = []
    for family in ("all", *dict.fromkeys(f for f, *_ in cases)):
        mine = [(a, b) for f, a, b in cases if family in ("all", f)]
        grid, adaptive = ([pair[k] for pair in mine] for k in (0, 1))
        width: list[Callable[[Result], float]] = [lambda r: r.half_mean, lambda r: r.half_new]
        of_medians = [1 - np.median([w(r) for r in adaptive]) / np.median([w(r) for r in grid]) for w in width]
        paired = [1 - np.median([w(b) / w(a) for a, b in mine]) for w in width]
        parts += [
            f"{family}: {len(mine)} surfaces",
            table([header, row("IsoFLOP", grid), row("adaptive", adaptive)]),
            "narrower: interval of the mean {:.0%}, of a new run {:.0%} (medians); {:.0%}, {:.0%} (median of the ratios)\n".format(
                *of_medians, *paired
            ),
        ]
    return "\n".join(parts)


def main(argv: list[str]) -> None:
    """Simulate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surfaces", type=int, default=200, help="how many are simulated (default 200)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one BLAS thread each (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first surface (default 0)")
    args = parser.parse_args(argv)
    if args.surfaces < 1 or args.jobs < 1 or args.seed < 0:
        raise InputError(
            f"--surfaces {args.surfaces} --jobs {args.jobs} --seed {args.seed}: positive, the seed 0 or more"
        )
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the new processes when they load numpy
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        work = pool.imap(run_case, range(args.seed, args.seed + args.surfaces))
        cases = list(tqdm(work, total=args.surfaces, unit="surface", disable=None))
    print(text(cases))
    print(f"{args.surfaces} surfaces in {time.perf_counter() - start:.0f} s with {args.jobs} processes")


if __name__ == "__main__":
    run_command(main)
