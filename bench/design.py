"""Adaptive design against an IsoFLOP grid of equal FLOPs: the 90% interval of the forecast on simulated surfaces.

The surfaces are those of bench/coverage.py: half Chinchilla-like, half asymmetric; noise is 1% of loss. The IsoFLOP grid has 5
budgets from 1e19 to 1e21 FLOPs and 9 sizes within ±4× of the true N*. The adaptive sweep starts with a tenth of those FLOPs on
such a grid of 5 × 7 from 1e18 to 1e20, then buys what `choose_largest` says in two rounds, no run dearer than a quarter of
the whole, or an eighth. Both forecast the loss at the true N* and D* of 3e22 FLOPs, 30 times the grid's largest run, by `fit_law`.
"interval of the mean": of the predicted loss, without the noise of the run that comes, which no sweep can lower;
"of a new run": as analysis.fit prints it; its floor is z·1%, what a sweep that knew the law exactly would say. Coverage: of
the true loss, and of a new run's, with binomial standard errors.

python bench/design.py [--surfaces 200] [--jobs 1] [--seed 0] [--rows FILE]
Wanted: the interval at least 30% narrower in the median, as many of the new runs inside as with the grid.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from coverage import make_case, share
from tqdm import tqdm

from analysis.decide.design import Candidates, aim, choose_largest, levels
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
_RESAMPLES = 2000
_Z90 = 1.645
_INTERVALS = (
    ("of the mean", "half_mean", "error_mean"),
    ("of a new run", "half_new", "error_new"),
    ("of a new run, noise known", "half_known", "error_new"),
)


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
    error_mean: float
    """ln(predicted / true)."""
    error_new: float
    """ln(predicted / a new run's loss); the same run for both sweeps."""
    run_noise: float

    @property
    def half_known(self) -> float:
        """Of a new run, with the true noise of a run in place of the estimate."""
        t = (self.half_new**2 - self.half_mean**2) ** 0.5 / self.run_noise
        return float(np.hypot(self.half_mean, t * NOISE.sd))


Case = tuple[str, Result, Result]
"""The family of a surface; what the IsoFLOP grid and the adaptive sweep say about it."""


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
        error_mean=error,
        error_new=error - new,
        run_noise=fit.run_noise,
    )


def adaptive_sweep(surface: Surface, budget_flops: float, seed: int) -> Runs:
    """A pilot, then rounds of chosen runs, until the budget is spent."""
    runs = simulate(surface, PILOT.cells(surface), NOISE, [seed, 2])
    ratio = runs.table["n_tokens"] / runs.table["n_params"]
    done: Counter[tuple[float, float]] = Counter()
    for k in range(ROUNDS):
        fit, data = fit_law(runs, draws=ROUND_DRAWS, seed=seed), points(runs)
        left = budget_flops - float(runs.table["flops"].sum())
        sets = [
            candidates(LARGEST_SHARE * budget_flops / c, float(ratio.min()), float(ratio.max()), done) for c in (2, 1)
        ]
        design, chosen = choose_largest(fit, data, sets, aim(fit, None, data, TARGET_FLOPS), left)
        bought = design.cheapest(chosen, left / (ROUNDS - k))
        rows = np.repeat(np.arange(len(chosen)), bought)
        number = np.concatenate([chosen.seeds_done[i] + np.arange(bought[i]) for i in np.flatnonzero(bought)])
        cells = Cells(chosen.n[rows], chosen.d[rows], chosen.flops[rows], number)
        new = simulate(surface, cells, NOISE, [seed, 3 + k])
        new.table["run_id"] = [f"round {k} {i}" for i in range(len(rows))]
        done.update(zip(cells.n, cells.flops, strict=True))
        runs = dataclasses.replace(runs, table=pd.concat([runs.table, new.table], ignore_index=True))
    return runs


def candidates(largest: float, low: float, high: float, done: Counter[tuple[float, float]]) -> Candidates:
    """Sizes at the compute levels from `largest` down, of D/N from low to high; done: runs of (N, C) that there are."""
    flops, n = np.meshgrid(levels(largest, 1e18), 10 ** np.arange(5, 14, 1 / SIZES_A_DECADE))
    d = flops / 6 / n
    legal = (d / n >= low) & (d / n <= high)
    n, d, flops = n[legal], d[legal], flops[legal]
    return Candidates(n, d, flops, flops, np.array([done[cell] for cell in zip(n, flops, strict=True)], int))


def run_case(seed: int) -> Case:
    """The surface of that number."""
    case = make_case(seed)
    grid = simulate(case.surface, ISOFLOP.cells(case.surface), NOISE, [seed, 0])
    adaptive = adaptive_sweep(case.surface, float(grid.table["flops"].sum()), seed)
    return case.family, judge(case.surface, grid, seed), judge(case.surface, adaptive, seed)


def sweep_row(name: str, results: Sequence[Result]) -> list[str]:
    """What one design bought and how far off it was."""
    median = {f.name: float(np.median([getattr(r, f.name) for r in results])) for f in dataclasses.fields(Result)}
    return [
        name,
        f"{median['runs']:.0f}",
        f"{median['flops']:.3g}",
        f"{TARGET_FLOPS / median['largest_flops']:.3g}",
        *(
            f"{100 * np.mean(np.square([getattr(r, k) for r in results])) ** 0.5:.2f}"
            for k in ("error_mean", "error_new")
        ),
        f"{100 * median['run_noise']:.2f}",
    ]


def interval_row(name: str, width: str, miss: str, pairs: Sequence[tuple[Result, Result]]) -> list[str]:
    """An interval of both designs (fields of Result: half-width and error), and how much narrower the adaptive one is.

    At equal coverage: each design's half-widths times the factor with which 90% of the surfaces would have been inside;
    its error is a bootstrap over surfaces.
    """
    half, error = (np.array([[getattr(r, key) for r in p] for p in pairs]) for key in (width, miss))
    inside = np.abs(error) <= half
    apart = inside[:, 1].astype(float) - inside[:, 0]

    def equal_coverage(rows: np.ndarray) -> float:
        grid, adaptive = np.median(half[rows], 0) * np.quantile(np.abs(error[rows]) / half[rows], 0.9, axis=0)
        return float(1 - adaptive / grid)

    draws = np.random.default_rng(0).integers(len(pairs), size=(_RESAMPLES, len(pairs)))
    widths = np.median(half, 0)
    return [
        name,
        *(f"{100 * w:.2f}" for w in widths),
        f"{100 * (1 - widths[1] / widths[0]):.0f}",
        f"{100 * (1 - np.median(half[:, 1] / half[:, 0])):.0f}",
        f"{100 * equal_coverage(np.arange(len(pairs))):.0f} ± {100 * np.std([equal_coverage(rows) for rows in draws]):.0f}",
        *(share(list(column)) for column in inside.T),
        f"{100 * apart.mean():+.1f} ± {100 * apart.std() / len(pairs) ** 0.5:.1f}",
    ]


def text(cases: Sequence[Case]) -> str:
    """The tables, all surfaces and by family."""
    sweeps = ["design", "runs", "FLOPs", "×", "rms error, %", "of a new run, %", "run noise, %"]
    intervals = ["90% interval", "± IsoFLOP", "± adaptive", "narrower, %", "paired", "at equal coverage"]
    intervals += ["in, IsoFLOP, %", "in, adaptive, %", "difference"]
    parts = []
    for family in ("all", *dict.fromkeys(f for f, *_ in cases)):
        mine = [(a, b) for f, a, b in cases if family in ("all", f)]
        floor = 1 - _Z90 * NOISE.sd / np.median([grid.half_new for grid, _ in mine])
        parts += [
            f"{family}: {len(mine)} surfaces",
            table(
                [sweeps, *(sweep_row(name, [p[k] for p in mine]) for k, name in enumerate(("IsoFLOP", "adaptive")))]
            ),
            table([intervals, *(interval_row(*kind, mine) for kind in _INTERVALS)]),
            f"a new run's is at most {100 * floor:.0f}% narrower: then its own noise is all that is left\n",
        ]
    return "\n".join(parts)


def read_rows(path: Path) -> dict[int, Case]:
    """What an earlier call wrote, by the number of the surface; a line that it did not finish is left out."""
    found: dict[int, Case] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            seed, family, grid, adaptive = json.loads(line)
        except ValueError:
            continue
        found[seed] = family, Result(**grid), Result(**adaptive)
    return found


def simulate_cases(seeds: Sequence[int], jobs: int, rows: Path | None) -> list[Case]:
    """Every surface's outcome; those that `rows` holds are not simulated again, the others are added to it one by one."""
    found = read_rows(rows) if rows else {}
    left = [seed for seed in seeds if seed not in found]
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the new processes when they load numpy
    with multiprocessing.get_context("spawn").Pool(jobs) as pool, (rows or Path(os.devnull)).open("a") as file:
        for seed, case in zip(left, tqdm(pool.imap(run_case, left), total=len(left), disable=None), strict=True):
            found[seed] = case
            family, grid, adaptive = case
            line = json.dumps([seed, family, asdict(grid), asdict(adaptive)])
            print(line, file=file, flush=True)
    return [found[seed] for seed in seeds]


def main(argv: list[str]) -> None:
    """Simulate and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surfaces", type=int, default=200, help="how many are simulated (default 200)")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one BLAS thread each (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first surface (default 0)")
    parser.add_argument("--rows", type=Path, help="JSON lines: outcomes are kept there, and the same command goes on")
    args = parser.parse_args(argv)
    if args.surfaces < 1 or args.jobs < 1 or args.seed < 0:
        raise InputError(
            f"--surfaces {args.surfaces} --jobs {args.jobs} --seed {args.seed}: positive, the seed 0 or more"
        )
    start = time.perf_counter()
    print(text(simulate_cases(range(args.seed, args.seed + args.surfaces), args.jobs, args.rows)))
    print(f"{args.surfaces} surfaces in {time.perf_counter() - start:.0f} s with {args.jobs} processes")


if __name__ == "__main__":
    run_command(main)
