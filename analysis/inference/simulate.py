"""Simulated sweeps: a known surface, noise and a grid → runs; many of them → the error to expect of a forecast."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from analysis.inference.fitting import fit_law
from analysis.laws import PUBLISHED, Floats, compute_optimal
from analysis.runs import Runs
from scaling.errors import InputError, unknown
from scaling.spec import RunSpec

PARAMETERS = ("E", "A", "B", "alpha", "beta")
_HIGHEST_LOSS = 1000.0


@dataclass(frozen=True)
class Surface:
    """A loss surface that is known: L = E + A/N^α + B/D^β (Hoffmann et al. 2022, arXiv 2203.15556, eq. 2)."""

    parameters: Mapping[str, float]
    """E ≥ 0, A, B, alpha, beta > 0; loss in nats per token."""
    name: str = "given"

    def __post_init__(self) -> None:
        if set(self.parameters) != set(PARAMETERS):
            raise InputError(
                f"surface with {', '.join(self.parameters) or 'no parameters'}: give each of {', '.join(PARAMETERS)} once"
            )
        for name, value in self.parameters.items():
            if not (np.isfinite(value) and (value > 0 or (name == "E" and value == 0))):
                raise InputError(f"surface with {name} = {value:g}: must be a positive number (E may be 0)")

    def loss(self, n: ArrayLike, d: ArrayLike) -> Floats:
        """L at N = n, D = d, without noise; the arrays broadcast."""
        e, a, b, alpha, beta = (self.parameters[k] for k in PARAMETERS)
        loss: Floats = e + a * np.asarray(n, float) ** -alpha + b * np.asarray(d, float) ** -beta
        return loss

    def optimum(self, budget_flops: float) -> tuple[float, float]:
        """N*, D* with 6·N·D = C."""
        return compute_optimal(self.parameters, budget_flops)


def published_surface(name: str) -> Surface:
    """The published law whose name starts so ("hoffmann", "Besiroglu et al. 2024").

    Raises:
        InputError: none or several start so; lists all of the Chinchilla form.
    """
    laws = [law for law in PUBLISHED if set(law.parameters) == set(PARAMETERS)]
    found = [law for law in laws if name and law.name.lower().startswith(name.lower())]
    if len(found) != 1:
        raise unknown("published law", name, [law.name.lower() for law in laws])
    return Surface(dict(found[0].parameters), found[0].name)


def surface_through(
    budget_flops: float,
    tokens_per_param: float,
    reducible: float,
    floor: float,
    alpha: float,
    beta: float,
) -> Surface:
    """The surface with a given optimum: at D/N = tokens_per_param for 6·N·D = C, where L = floor + reducible.

    From αA/N^α = βB/D^β at the optimum: A/N^α = reducible·β/(α+β), B/D^β = reducible·α/(α+β).
    """
    n = (budget_flops / 6 / tokens_per_param) ** 0.5
    d = n * tokens_per_param
    share = reducible / (alpha + beta)
    return Surface(
        {"E": floor, "A": share * beta * n**alpha, "B": share * alpha * d**beta, "alpha": alpha, "beta": beta}
    )


@dataclass(frozen=True)
class Noise:
    """How runs miss the surface."""

    sd: float = 0.01
    """Standard deviation of ln loss between runs."""
    outliers: float = 0.0
    """Share of runs that are mis-tuned: their loss is only ever higher."""
    outlier_size: tuple[float, float] = (0.02, 0.1)
    """By how much, relative, uniform in this range."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.sd) and 0 <= self.sd < 1):
            raise InputError(f"noise {self.sd:g}: standard deviation of ln loss, 0 to below 1 (0.01 is 1%)")
        if not 0 <= self.outliers < 1:
            raise InputError(f"outliers {self.outliers:g}: the share of mis-tuned runs, 0 to below 1 (0.05 is 5%)")
        low, high = self.outlier_size
        if not (np.isfinite(high) and 0 <= low <= high):
            raise InputError(f"outlier size {low:g} to {high:g}: two relative rises of the loss, 0 ≤ low ≤ high")

    def draw(self, rng: np.random.Generator, count: int) -> Floats:
        """(count,) errors of ln loss."""
        mistuned = rng.random(count) < self.outliers
        rise = np.log1p(rng.uniform(*self.outlier_size, size=count))
        return self.sd * rng.standard_normal(count) + np.where(mistuned, rise, 0.0)


@dataclass(frozen=True)
class Cells:
    """The runs of a sweep before they are run."""

    n: Floats
    """(m,) parameters."""
    d: Floats
    """(m,) tokens."""
    flops: Floats
    """(m,)"""
    seed: np.ndarray
    """(m,) int; runs that differ by it alone share a cell."""
    convention: str = "6nd"
    """What `flops` counts: 6nd | exact."""

    def __len__(self) -> int:
        return len(self.n)

    @property
    def largest_flops(self) -> float:
        """Compute of the largest run."""
        return float(self.flops.max())

    @property
    def flops_ratio(self) -> float:
        """C / (6·N·D), geometric mean over the runs within 20% of the largest's compute."""
        top = self.flops >= self.flops.max() / 1.2
        return float(np.exp(np.mean(np.log(self.flops[top] / (6 * self.n[top] * self.d[top])))))


@dataclass(frozen=True)
class Grid:
    """An IsoFLOP grid: sizes log-spaced about each budget's N*."""

    budgets: tuple[float, ...]
    """FLOPs, 6·N·D."""
    sizes: int
    """Sizes a budget; one: the centre alone."""
    spread: float
    """Half-width: sizes go from centre/spread to centre·spread."""
    centre: tuple[float, float] = (1.0, 1.0)
    """Centre over the true N* at the smallest and at the largest budget, geometric in ln C between: the drift."""
    seeds: int = 1
    """Runs of each cell."""

    def __post_init__(self) -> None:
        if not self.budgets or not all(np.isfinite(c) and c > 0 for c in self.budgets):
            raise InputError(
                f"budgets {', '.join(f'{c:g}' for c in self.budgets) or '(none)'}: positive FLOPs, one or more"
            )
        if self.sizes < 1 or self.seeds < 1:
            raise InputError(f"{self.sizes} sizes a budget, {self.seeds} seeds: each must be at least 1")
        if not (np.isfinite(self.spread) and self.spread >= 1) or (self.spread == 1 and self.sizes > 1):
            raise InputError(
                f"spread {self.spread:g}: sizes go from N*/spread to N*·spread, so more than 1 (4 to 8 is usual)"
            )
        if not all(np.isfinite(f) and f > 0 for f in self.centre):
            raise InputError(
                f"centre {self.centre[0]:g}:{self.centre[1]:g}: factors over N*, positive (1:1 is centred)"
            )

    def cells(self, surface: Surface) -> Cells:
        """The grid on a surface, whose N* it is laid about."""
        ln_c = np.log(np.unique(self.budgets))
        along = (ln_c - ln_c[0]) / max(np.ptp(ln_c), 1e-12)
        first, last = np.log(self.centre)
        steps = np.linspace(-1, 1, self.sizes) * np.log(self.spread) if self.sizes > 1 else np.zeros(1)
        best = np.log([surface.optimum(c)[0] for c in np.exp(ln_c)])
        ln_n = (best + first + (last - first) * along)[:, None] + steps
        n = np.repeat(np.exp(ln_n).ravel(), self.seeds)
        flops = np.repeat(np.exp(ln_c), self.sizes * self.seeds)
        return Cells(n, flops / (6 * n), flops, np.tile(np.arange(self.seeds), len(n) // self.seeds))


def planned_cells(specs: Sequence[RunSpec]) -> Cells:
    """The cells of planned runs: N of body and head, exact FLOPs.

    Raises:
        InputError: no run is planned.
    """
    if not specs:
        raise InputError("the plan has no run: there is nothing to simulate")
    n, d, flops = (
        np.array(v, float) for v in zip(*((s.params.body_head, s.tokens, s.flops) for s in specs), strict=True)
    )
    return Cells(n, d, flops, np.array([s.seed for s in specs]), "exact")


def simulate(surface: Surface, cells: Cells, noise: Noise, seed: int | Sequence[int]) -> Runs:
    """One simulated sweep: ln L = ln L(N, D) + noise. Equal arguments give equal runs.

    Raises:
        InputError: the surface is not meant for runs of this size: a loss above 1,000 nats, or none at all.
    """
    import pandas as pd

    true = surface.loss(cells.n, cells.d)
    if not (true.min() > 0 and true.max() <= _HIGHEST_LOSS):
        raise InputError(
            f"surface {surface.name} gives losses of {true.min():.3g} to {true.max():.3g} nats to runs of N {cells.n.min():.3g} "
            f"to {cells.n.max():.3g}: expected above 0 and up to {_HIGHEST_LOSS:g}; give a surface that holds at that size"
        )
    loss = true * np.exp(noise.draw(np.random.default_rng(seed), len(cells)))
    table = pd.DataFrame(
        {
            "run_id": [f"simulated {i}" for i in range(len(cells))],
            "n_params": cells.n,
            "n_tokens": cells.d,
            "flops": cells.flops,
            "loss": loss,
            "seed": cells.seed,
            "status": "ok",
        }
    )
    params = "body_head" if cells.convention == "exact" else "as_given"
    counted = {"params": params, "flops": cells.convention, "loss": "nats_per_token"}
    return Runs(table=table, source=f"simulated: {surface.name}", convention=counted)


@dataclass(frozen=True)
class Outcome:
    """What one simulated sweep said about the compute-optimal run of the target compute."""

    law: str
    """The law that the fit went by."""
    error: float
    """ln(predicted / true loss) at the true N*, D*."""
    half_width_50: float
    """Half the width of ln of the 50% prediction interval."""
    half_width_90: float
    inside_50: bool
    """Whether the loss of one new run there, noise included, is inside."""
    inside_90: bool
    n_error: float | None
    """ln(fitted N* / true N*); None when the fitted law has no optimum."""


def forecast_error(
    surface: Surface,
    cells: Cells,
    noise: Noise,
    target_flops: float,
    *,
    seed: int,
    law: str = "auto",
    draws: int = 200,
) -> Outcome:
    """Simulate a sweep, fit it, and hold its forecast against the truth.

    The new run is well tuned: `noise.sd` alone separates it from the surface.

    Raises:
        InputError: too few cells for the law.
    """
    fit = fit_law(simulate(surface, cells, noise, [seed, 0]), law, draws=draws, seed=seed)
    ratio = cells.flops_ratio
    n, d = surface.optimum(target_flops / ratio)
    true = float(surface.loss(n, d))
    new = true * float(np.exp(noise.sd * np.random.default_rng([seed, 1]).standard_normal()))
    (low_50, high_50), (low_90, high_90) = (map(float, fit.predict_interval(n, d, level)) for level in (0.5, 0.9))
    try:
        n_error = float(np.log(fit.allocate(target_flops / ratio)[0] / n))
    except InputError:  # a frontier law, or a term that is 0 at the minimum
        n_error = None
    return Outcome(
        law=fit.law,
        error=float(np.log(fit.predict(n, d) / true)),
        half_width_50=float(np.log(high_50 / low_50)) / 2,
        half_width_90=float(np.log(high_90 / low_90)) / 2,
        inside_50=low_50 <= new <= high_50,
        inside_90=low_90 <= new <= high_90,
        n_error=n_error,
    )


@dataclass(frozen=True)
class Power:
    """What a grid is worth: statistics of its simulated forecasts. Errors and widths are of ln loss, so relative."""

    n_runs: int
    flops: float
    """Bought by the whole grid."""
    target_flops: float
    sweeps: int
    mean_error: float
    """Mean |error| at the target's optimum."""
    error_90: float
    """90th percentile of |error|."""
    half_width_50: float
    """Median."""
    half_width_90: float
    """Median."""
    coverage_50: float
    coverage_90: float
    n_error: float | None
    """Median |ln(N̂*/N*)|; None when no fit had an optimum."""
    no_optimum: int
    """Sweeps whose fit had none."""
    laws: dict[str, int]
    """How often each law was chosen."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return dataclasses.asdict(self)


def summarise(cells: Cells, target_flops: float, outcomes: Sequence[Outcome]) -> Power:
    """Statistics over the simulated sweeps of one grid, at least one."""
    error = np.abs([o.error for o in outcomes])
    n_error = [abs(o.n_error) for o in outcomes if o.n_error is not None]
    chosen = [o.law for o in outcomes]
    return Power(
        n_runs=len(cells),
        flops=float(cells.flops.sum()),
        target_flops=target_flops,
        sweeps=len(outcomes),
        mean_error=float(error.mean()),
        error_90=float(np.quantile(error, 0.9)),
        half_width_50=float(np.median([o.half_width_50 for o in outcomes])),
        half_width_90=float(np.median([o.half_width_90 for o in outcomes])),
        coverage_50=float(np.mean([o.inside_50 for o in outcomes])),
        coverage_90=float(np.mean([o.inside_90 for o in outcomes])),
        n_error=float(np.median(n_error)) if n_error else None,
        no_optimum=len(outcomes) - len(n_error),
        laws={law: chosen.count(law) for law in sorted(set(chosen), key=lambda name: (-chosen.count(name), name))},
    )
