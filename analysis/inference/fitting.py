"""Fit a law to runs: parameters, intervals, backtest, prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from analysis.inference.backtest import BacktestRow, backtest, choose_law, form_error
from analysis.inference.isoflop import approaches
from analysis.inference.points import Points, check_enough, compute_levels, frontier_rows, points, seed_noise
from analysis.inference.solver import HUBER, Robust, log_predictions, solve
from analysis.inference.uncertainty import FormError, bootstrap, t_quantile
from analysis.laws.law import Floats, Law, complete
from analysis.laws.power import compute_optimal
from analysis.laws.surface import get_law
from analysis.runs import Runs
from scaling.errors import InputError

DRAWS = 1000


@dataclass(frozen=True)
class Rival:
    """A law that was not chosen, with its weight by backtest and its fit."""

    law: str
    weight: float
    values: Floats
    """(1, p)"""


@dataclass(frozen=True)
class FitResult:
    """A fitted law."""

    law: str
    """Its name in analysis.laws.LAWS."""
    parameters: dict[str, float]
    objective: float
    """Summed Huber(1e-3) of the log residuals at the minimum."""
    n_runs: int
    run_ids: tuple[str, ...]
    """The runs fitted, in the order of `residuals`."""
    residuals: Floats
    """ln(actual / predicted) of each run."""
    intervals: dict[str, tuple[float, float]]
    """95% bootstrap interval of each parameter."""
    samples: dict[str, Floats]
    """Bootstrap draws of each parameter, (draws,) each."""
    seed_noise: float | None
    """Standard deviation of ln loss between seeds of one cell; None without replicates."""
    run_noise: float
    """Standard deviation of ln loss of one run about the law: the larger of seed noise and residual spread."""
    form: FormError
    """Law-form error of an extrapolation."""
    backtest: tuple[dict[str, Any], ...]
    """BacktestRows as dictionaries: of this law, then of the other candidates."""
    approaches: dict[str, dict[str, Any]]
    """Chinchilla's three approaches, "1", "2", "3": N* and D* as functions of C, or why there is none."""
    largest_flops: float
    """Compute of the largest run fitted."""
    flops_ratio: float
    """C / (6·N·D) of the runs in the table's own counting, geometric mean over the largest level."""
    convention: dict[str, str]
    source: str
    starts_agreeing: int
    warnings: tuple[str, ...] = ()
    n_cells: int = 0
    """Different runs, seeds apart."""
    rivals: tuple[Rival, ...] = ()
    """The other candidates of law="auto": how far they disagree is part of the interval."""
    _draws: Floats = field(default_factory=lambda: np.empty((0, 0)), repr=False)

    @property
    def surface(self) -> Law:
        """The law's form."""
        return get_law(self.law)

    def _flops(self, n: ArrayLike, d: ArrayLike) -> Floats:
        return 6.0 * self.flops_ratio * np.asarray(n, float) * np.asarray(d, float)

    def predict(self, n: ArrayLike, d: ArrayLike) -> Floats:
        """Loss at N parameters and D tokens, in the runs' conventions; the arrays broadcast."""
        return self.surface.predict(self.parameters, n, d, self._flops(n, d))

    def predict_interval(self, n: ArrayLike, d: ArrayLike, level: float) -> tuple[Floats, Floats]:
        """Central prediction interval of one run's loss at (N, D).

        ln L ± t·√(σ_param² + σ_form² + σ_law² + σ_run²): bootstrap draws of the parameters widened by √(n/(n−p));
        law-form error growing with ln(C / largest C), from the backtest; weighted mean square distance to the rival
        laws; the noise of a single run. t is Student's, with as many degrees of freedom as the weaker of runs and
        backtest cuts has.

        Returns:
            lower and upper ends, of the broadcast shape.
        """
        centre = np.log(self.predict(n, d))
        half = t_quantile(level, self.freedom) * self.predictive_sd(n, d)
        return np.exp(centre - half), np.exp(centre + half)

    def predictive_sd(self, n: ArrayLike, d: ArrayLike) -> Floats:
        """Standard deviation of ln loss of one run at (N, D), all parts."""
        n, d = np.broadcast_arrays(np.asarray(n, float), np.asarray(d, float))
        flops = self._flops(n, d)
        x = {k: v.ravel() for k, v in complete({"n_params": n, "n_tokens": d, "flops": flops}).items()}
        centre = log_predictions(self.surface, self._values[None], x)
        deviation = log_predictions(self.surface, self._draws, x) - centre
        p = len(self.surface.free)
        widened = self.n_cells / max(self.n_cells - p, 1)
        parameter = ((deviation**2).mean(0) * widened).reshape(np.shape(n))
        form = self.form.sd(np.log(flops / self.largest_flops))
        spread = np.zeros(np.size(n))
        for rival in self.rivals:
            spread += rival.weight * (log_predictions(get_law(rival.law), rival.values, x)[0] - centre[0]) ** 2
        sd: Floats = np.sqrt(parameter + form**2 + spread.reshape(np.shape(n)) + self.run_noise**2)
        return sd

    @cached_property
    def _values(self) -> Floats:
        return np.array([self.parameters[name] for name in self.surface.free])

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the interval."""
        return max(min(self.n_cells - len(self.surface.free), 2 * self.form.freedom), 1)

    def extrapolation_ratio(self, flops: float) -> float:
        """flops over the largest fitted run's."""
        return flops / self.largest_flops

    def allocate(
        self, budget_flops: float, flops_per_token: Callable[[Floats], Floats] | None = None
    ) -> tuple[float, float]:
        """Compute-optimal N*, D* for a budget.

        Args:
            budget_flops: C.
            flops_per_token: training FLOPs of one token as a function of N; C = 6·N·D in closed form when None.
        Raises:
            InputError: the law does not depend on N and D apart, or misses a term.
        """
        if self.surface.on_frontier:
            raise InputError(
                f"the law {self.law!r} gives loss for compute only: N* and D* need a surface, e.g. chinchilla"
            )
        if not budget_flops > 0:
            raise InputError(f"budget {budget_flops!r}: must be a positive number of FLOPs")
        n, d = compute_optimal(self.parameters, budget_flops)
        if flops_per_token is None:
            return n, d
        grid = np.exp(np.linspace(np.log(n) - 4, np.log(n) + 4, 4001))
        tokens = budget_flops / flops_per_token(grid)
        best = int(np.argmin(self.predict(grid, tokens)))
        return float(grid[best]), float(tokens[best])


def fit_law(runs: Runs, law: str = "auto", *, draws: int = DRAWS, seed: int = 0, robust: Robust = HUBER) -> FitResult:
    """Fit a law.

    Args:
        law: a name in LAWS, or "auto": Chinchilla's law unless the backtest clearly prefers a special case of it.
        draws: bootstrap refits.
        seed: of the bootstrap; equal inputs give equal results.
        robust: the loss of residuals.
    Raises:
        InputError: unknown law, or fewer different runs than it has parameters.
    """
    everything = points(runs)
    form = get_law("chinchilla" if law == "auto" else law)
    data = everything.take(frontier_rows(everything)) if form.on_frontier else everything
    if law == "auto" and data.n_cells < len(form.free):
        check_enough(data, get_law("tied_no_floor"))
    else:
        check_enough(data, form)
    seeds = seed_noise(data)
    first = solve(form, data.columns, data.loss, robust)
    noise = _run_noise(form, data, first.values[0], seeds)
    rivals: tuple[Rival, ...] = ()
    if law == "auto":
        choice = choose_law(data, noise, robust)
        form = choice.law
        best = solve(form, data.columns, data.loss, robust)
        rows = tuple(sorted(choice.rows, key=lambda r: r.law != form.name))
        rivals = tuple(
            Rival(name, weight, solve(get_law(name), data.columns, data.loss, robust).values)
            for name, weight in choice.weights.items()
            if name != form.name
        )
    else:
        best, rows = first, backtest(form, data, noise, robust=robust)
    values = best.values[0]
    noise = _run_noise(form, data, values, seeds)
    sample = bootstrap(form, data, values, draws, seed, robust).values
    named = [form.parameters(v) for v in sample]
    samples = {name: np.array([s[name] for s in named]) for name in form.parameters(values)}
    top = compute_levels(data) == compute_levels(data).max()
    return FitResult(
        law=form.name,
        parameters=form.parameters(values),
        objective=float(best.objective[0]),
        n_runs=len(data),
        run_ids=data.run_ids,
        residuals=np.log(data.loss) - log_predictions(form, best.values, data.columns)[0],
        intervals={k: (float(np.quantile(v, 0.025)), float(np.quantile(v, 0.975))) for k, v in samples.items()},
        samples=samples,
        seed_noise=seeds,
        run_noise=noise,
        form=form_error([r for r in rows if r.law == form.name], noise),
        backtest=tuple(row.to_dict() for row in rows),
        approaches=approaches(everything, None if form.on_frontier else form.parameters(values)),
        largest_flops=float(np.exp(data.log_flops.max())),
        flops_ratio=float(np.exp((data.x[top, 2] - data.x[top, 0] - data.x[top, 1]).mean()) / 6),
        convention=runs.convention,
        source=runs.source,
        starts_agreeing=best.starts_agreeing,
        warnings=_warnings(form, data, form.parameters(values), samples, law, rows, bool(best.converged[0])),
        n_cells=data.n_cells,
        rivals=rivals,
        _draws=sample,
    )


def _run_noise(law: Law, data: Points, values: Floats, seeds: float | None) -> float:
    """The larger of seed noise and the residuals' robust spread (1.4826·median |r|, widened by √(n/(n−p)))."""
    r = np.log(data.loss) - log_predictions(law, values[None], data.columns)[0]
    n, p = data.n_cells, len(law.free)
    spread = 1.4826 * float(np.median(np.abs(r))) * float(np.sqrt(n / max(n - p, 1)))
    return max(spread, seeds or 0.0, 1e-6)


def _warnings(
    law: Law,
    data: Points,
    parameters: Mapping[str, float],
    samples: Mapping[str, Floats],
    asked: str,
    rows: Sequence[BacktestRow],
    converged: bool,
) -> tuple[str, ...]:
    out = []
    if not converged:
        out.append("the solver's last step was not below its tolerance: treat the parameters as approximate")
    if asked == "auto" and law.name != "chinchilla":
        out.append(
            f"law {law.name!r} ({law.formula}) was chosen: it predicts held-out compute better than chinchilla's"
        )
    if "E" in law.free and np.mean(samples["E"] < 0.05 * np.median(data.loss)) > 0.025:
        out.append(
            f"E is not identified: its draws reach 0 (E = {parameters['E']:.3g}); losses this far above the floor say "
            "little about it"
        )
    if not law.on_frontier:
        ratio = data.x[:, 1] - data.x[:, 0]
        if ratio.std() < 0.1:
            out.append("all runs lie on one tokens-per-parameter ray: N and D cannot be told apart; add runs off it")
        if len(np.unique(compute_levels(data))) == 1 and np.ptp(data.log_flops) < 0.2:
            out.append("all runs have one compute budget: nothing tells how loss falls with compute")
        missing = [k for k in ("A", "B") if parameters[k] <= 0]
        if missing:
            out.append(f"{missing[0]} = 0 at the minimum: the runs do not show that term, so there is no optimal N")
    if not rows:
        out.append("too few compute levels for a backtest: the interval's law-form part is a prior, not measured")
    return tuple(out)
