"""How well exponents are recovered from noisy sweeps of random surfaces, ours beside the usual ways, in one run.

Surfaces: α and β uniform in .1–.6, E in 1–2.5, the optimum of the middle budget at 5 to 80 tokens a parameter, both
terms .2 to 2 nats there. Grid: 5 budgets from 1e17 to 1e21, 15 sizes within ±8× of N*. Noise: 1% Gaussian on ln loss.
Methods:
    ours                 fit_law(law="chinchilla") with its default loss (Huber 1e-3)
    ours, squared        the same with squared residuals
    single start         scipy's L-BFGS-B on Huber 1e-3 of ln loss, parameters ln A, ln B, ln E, α, β, from one usual start
    grid start           the same from the best of the 4,500 starts of Hoffmann et al. 2022
    10 starts, tight     the same from the best 10 of them, to convergence: the minimum of ours, by the usual way
    approach 2           parabolas of each budget: gives β/(α+β), the exponent of N*, alone
Errors are relative. α, β: both exponents of all surfaces pooled; the geometric mean, the median and the worst.

python bench/recovery.py [--surfaces 1000] [--seed 0] [--noise .01] [--worst 5]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from peers import fit_grid_start, fit_many_starts, fit_single_start
from tqdm import tqdm

from analysis.inference import fit_law
from analysis.inference.isoflop import approach_2
from analysis.inference.points import points
from analysis.inference.simulate import Grid, Noise, Surface, simulate, surface_through
from analysis.inference.solver import HUBER, ROBUST, Robust
from analysis.runs import Runs
from scaling.errors import InputError, run_command
from scaling.text import table

BUDGETS = tuple(np.geomspace(1e17, 1e21, 5))
GRID = Grid(BUDGETS, sizes=15, spread=8.0)
TERM_RANGE = (0.2, 2.0)
Exponents = tuple[float | None, float | None, float]
"""α, β and the exponent of N*; None where a method does not give one."""


def random_surface(rng: np.random.Generator) -> Surface:
    """α and β uniform; terms within TERM_RANGE at the middle budget's optimum, where αA/N^α = βB/D^β."""
    alpha, beta = rng.uniform(0.1, 0.6, 2)
    low, high = (np.log(r) for r in TERM_RANGE)
    ratio = np.log(alpha / beta)  # of the D term over the N term
    ln_term = rng.uniform(max(low, low - ratio), min(high, high - ratio))
    return surface_through(
        BUDGETS[len(BUDGETS) // 2],
        tokens_per_param=float(np.exp(rng.uniform(np.log(5), np.log(80)))),
        reducible=float(np.exp(ln_term) * (1 + alpha / beta)),
        floor=float(rng.uniform(1.0, 2.5)),
        alpha=float(alpha),
        beta=float(beta),
    )


def ours(robust: Robust = HUBER) -> Callable[[Runs], Exponents]:
    """fit_law with this loss of residuals."""

    def fit(runs: Runs) -> Exponents:
        return _exponents(fit_law(runs, "chinchilla", draws=2, robust=robust).parameters)

    return fit


def peer(fit: Callable[..., dict[str, float]]) -> Callable[[Runs], Exponents]:
    """One of the usual ways."""
    return lambda runs: _exponents(fit(*(runs.table[c].to_numpy(float) for c in ("n_params", "n_tokens", "loss"))))


def _exponents(p: dict[str, float]) -> Exponents:
    total = p["alpha"] + p["beta"]
    return p["alpha"], p["beta"], p["beta"] / total if total else float("inf")


def parabolas(runs: Runs) -> Exponents:
    """Approach 2: the exponent of N* only."""
    return None, None, approach_2(points(runs)).get("n_exponent", float("inf"))


METHODS: dict[str, Callable[[Runs], Exponents]] = {
    "ours": ours(),
    "ours, squared": ours(robust=ROBUST["squared"]),
    "single start": peer(fit_single_start),
    "grid start": peer(fit_grid_start),
    "10 starts, tight": peer(fit_many_starts),
    "approach 2": parabolas,
}


def relative(found: Exponents, true: Exponents) -> list[float]:
    """|found/true − 1| of each, NaN where there is none."""
    return [np.nan if f is None or t is None else abs(f / t - 1) for f, t in zip(found, true, strict=True)]


def statistics(errors: np.ndarray) -> list[str]:
    """Geometric mean, median and worst, in percent."""
    values = errors[~np.isnan(errors)]
    if not len(values):
        return ["–"] * 3
    values = np.maximum(values, 1e-12)
    return [f"{100 * v:.3g}" for v in (np.exp(np.log(values).mean()), np.median(values), values.max())]


def main(argv: list[str]) -> None:
    """Fit every surface by every method and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--surfaces", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the surfaces and the noise (default 0)")
    parser.add_argument("--noise", type=float, default=0.01, help="standard deviation of ln loss (default .01)")
    parser.add_argument("--worst", type=int, default=0, help="list the surfaces on which ours is farthest off")
    args = parser.parse_args(argv)
    if args.surfaces < 1 or args.seed < 0:
        raise InputError(f"--surfaces {args.surfaces} --seed {args.seed}: at least 1 surface, the seed 0 or more")
    noise = Noise(args.noise)
    errors = np.empty((args.surfaces, len(METHODS), 3))
    seconds = np.zeros(len(METHODS))
    surfaces = []
    for i in tqdm(range(args.surfaces), unit="surface", disable=None):
        surface = random_surface(np.random.default_rng([args.seed, i, 0]))
        surfaces.append(surface)
        runs = simulate(surface, GRID.cells(surface), noise, [args.seed, i, 1])
        true = _exponents(dict(surface.parameters))
        for k, method in enumerate(METHODS.values()):
            start = time.process_time()
            errors[i, k] = relative(method(runs), true)
            seconds[k] += time.process_time() - start
    if args.worst:
        print(worst_text(surfaces, errors[:, 0, :2].max(1), args.worst), end="\n\n")
    head = ["method", "α, β: geometric mean, %", "median, %", "worst, %"]
    head += ["N* exponent: geometric mean, %", "median, %", "worst, %", "CPU ms a fit"]
    rows = [
        [name, *statistics(errors[:, k, :2]), *statistics(errors[:, k, 2]), f"{1e3 * seconds[k] / args.surfaces:.1f}"]
        for k, name in enumerate(METHODS)
    ]
    print(table([head, *rows]))
    print(f"{args.surfaces} surfaces, noise {args.noise:.2%}, seed {args.seed}")


def worst_text(surfaces: list[Surface], error: np.ndarray, count: int) -> str:
    """The surfaces on which ours is farthest off."""
    names = ("E", "A", "B", "alpha", "beta")
    rows = [["surface", *names, "error, %"]]
    for i in np.argsort(-error)[:count]:
        p = surfaces[i].parameters
        rows.append([str(i), *(f"{p[name]:.4g}" for name in names), f"{100 * error[i]:.1f}"])
    return table(rows)


if __name__ == "__main__":
    run_command(main)
