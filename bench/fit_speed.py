"""How fast a law is fitted and resampled, beside the usual way, in one run; CPU seconds of one process.

Fit: E + A/N^α + B/D^β by Huber 1e-3 on ln loss.
    ours    analysis.inference.solver.solve: many starts, to convergence
    usual   scipy's L-BFGS-B with the analytic gradient from each of the 4,500 starts of Hoffmann et al. 2022, best kept;
            timed on --starts of them, evenly taken, and scaled up
Bootstrap: 4,000 refits of resampled runs.
    ours    solver.resolve: all resamples at once
    usual   scipy's L-BFGS-B once a resample from the fit of the whole, to convergence; timed on --refits of them
Data: the 240 points of golden/epoch_svg where that folder is, else a simulated sweep of 240 runs.

OMP_NUM_THREADS=1 python bench/fit_speed.py [--golden DIR] [--starts 150] [--refits 100]   (wanted: ≥ 1,000 on the fit, ≥ 75 on the bootstrap)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from peers import GRID, fit

from analysis.inference.solver import resolve, solve
from analysis.laws import get_law
from analysis.laws.law import Floats
from scaling.errors import run_command
from scaling.text import table

DRAWS = 4_000
Data = tuple[str, Floats, Floats, Floats]


def runs(golden: Path) -> Data:
    """Name, N, D and loss."""
    path = golden / "epoch_svg" / "points.csv"
    if path.exists():
        t = pd.read_csv(path)
        t = t[t["loss"] < t["loss"].nlargest(5).min()]
        n, c = t["Model Size"].to_numpy(float), t["Training FLOP"].to_numpy(float)
        return "golden/epoch_svg", n, c / 6 / n, t["loss"].to_numpy(float)
    rng = np.random.default_rng(0)
    c, ratio = (a.ravel() for a in np.meshgrid(np.geomspace(1e18, 1e22, 16), np.geomspace(1 / 8, 8, 15)))
    n = np.sqrt(c / 120) * ratio
    d = c / 6 / n
    loss = (1.8 + 480 / n**0.35 + 2100 / d**0.37) * np.exp(0.01 * rng.standard_normal(len(n)))
    return "simulated", n, d, loss


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of the process's CPU seconds."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def main(argv: list[str]) -> None:
    """Time all four and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "golden"
    parser.add_argument("--golden", type=Path, default=default, metavar="DIR", help="folder of the golden data")
    parser.add_argument("--starts", type=int, default=150, help="of the 4,500 starts that are timed (default 150)")
    parser.add_argument("--refits", type=int, default=100, help="of the 4,000 resamples that are timed (default 100)")
    args = parser.parse_args(argv)

    name, n, d, loss = runs(args.golden)
    law, columns = get_law("chinchilla"), {"n_params": n, "n_tokens": d}
    best = solve(law, columns, loss)
    counts = np.random.default_rng(0).multinomial(len(n), np.full(len(n), 1 / len(n)), size=DRAWS)

    our_fit = cpu_seconds(lambda: solve(law, columns, loss), 9)
    starts = GRID[np.linspace(0, len(GRID) - 1, args.starts).astype(int)]
    usual_fit = cpu_seconds(lambda: fit(starts, n, d, loss), 1) * len(GRID) / len(starts)

    drawn = resolve(law, columns, loss, best.values[0], counts.astype(float)).values
    our_draws = cpu_seconds(lambda: resolve(law, columns, loss, best.values[0], counts.astype(float)), 3)
    e, a, b, alpha, beta = best.values[0]
    start = (np.log(a), np.log(b), np.log(e), alpha, beta)
    rows = [np.repeat(np.arange(len(n)), k) for k in counts[: args.refits]]
    peer = [fit(start, n[r], d[r], loss[r], tight=True) for r in rows]
    usual_draws = (
        cpu_seconds(lambda: [fit(start, n[r], d[r], loss[r], tight=True) for r in rows], 1) * DRAWS / len(rows)
    )
    apart = np.array([[p["alpha"], p["beta"]] for p in peer]) - drawn[: len(peer), 3:]

    print(f"{name}: {len(n)} runs; minimum {best.objective[0]:.15f}, {best.starts_agreeing} of {best.starts} starts")
    print(f"median |difference| of the resampled exponents, ours and usual: {np.median(np.abs(apart)):.1e}")
    print(
        table(
            [
                ["CPU seconds", "ours", "usual", "ratio"],
                ["fit", f"{our_fit:.4f}", f"{usual_fit:.1f}", f"{usual_fit / our_fit:,.0f}×"],
                ["4,000 resamples", f"{our_draws:.3f}", f"{usual_draws:.1f}", f"{usual_draws / our_draws:,.0f}×"],
            ]
        )
    )


if __name__ == "__main__":
    run_command(main)
