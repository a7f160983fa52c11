"""Fit a law to runs: parameters, intervals, backtest, prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from analysis.inference.backtest import BASELINE, EMPHASES, BacktestRow, Choice, Member, choose, form_error, judge
from analysis.inference.ensemble import Ensemble, backtest_rows, fit_ensemble, summary
from analysis.inference.isoflop import approaches
from analysis.inference.points import Points, check_enough, compute_levels, frontier_rows, points, seed_noise
from analysis.inference.solver import HUBER, Robust, solve
from analysis.inference.uncertainty import FormError, bootstrap, robust_scale, t_quantile
from analysis.laws.law import Floats, Law, complete
from analysis.laws.power import compute_optimal
from analysis.laws.surface import get_law
from analysis.runs import Runs
from scaling.errors import InputError

DRAWS = 1000
LARGE = 5_000
"""Above this many runs, all but the law's own minimum works on a random sample of them."""
_LEAST_N = 1e2
_LEAST_NOISE = 1e-6
_LEAST_LEFT = 0.1
_GRID, _ZOOMS = 400, 4


@dataclass(frozen=True)
class FitResult:
    """A fitted law."""

    law: str
    """Name in analysis.laws.LAWS of the law whose parameters these are. It predicts alone when it was asked for; else
    the ensemble does, and this is Chinchilla's law where the runs suffice for it."""
    parameters: dict[str, float]
    objective: float
    """Summed loss of the log residuals of that law at its minimum."""
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
    ensemble: Ensemble
    """What predicts: the law, or several weighed by backtest."""
    run_noise: float
    """Standard deviation of ln loss of one run about the law, from the residuals; from seeds where too few are left."""
    form: FormError
    """Law-form error of an extrapolation."""
    backtest: tuple[dict[str, Any], ...]
    """BacktestRows as dictionaries: of what predicts, then of the other laws and the baseline."""
    approaches: dict[str, dict[str, Any]]
    """Chinchilla's three approaches, "1", "2", "3": N* and D* as functions of C, or why there is none."""
    largest_flops: float
    """Compute of the largest run fitted."""
    flops_ratio: float
    """C / (6·N·D) of the runs in the table's own counting, geometric mean over the largest level."""
    convention: dict[str, str]
    source: str
    starts_agreeing: int
    """How many of the solver's starts reached the law's minimum."""
    starts: int = 1
    condition: float = float("nan")
    """Condition number of the fit (parameters scaled to equal curvature)."""
    warnings: tuple[str, ...] = ()
    n_cells: int = 0
    """Different runs, seeds apart."""

    @property
    def surface(self) -> Law:
        """The form of `law`."""
        return get_law(self.law)

    def columns(self, n: ArrayLike, d: ArrayLike) -> dict[str, Floats]:
        """Rows at (N, D), flat, as the ensemble's laws take them; C as the runs count it."""
        n, d = np.broadcast_arrays(np.asarray(n, float), np.asarray(d, float))
        flops = 6.0 * self.flops_ratio * n * d
        return {k: v.ravel() for k, v in complete({"n_params": n, "n_tokens": d, "flops": flops}).items()}

    def predict(self, n: ArrayLike, d: ArrayLike) -> Floats:
        """Loss at N parameters and D tokens, in the runs' conventions; the arrays broadcast."""
        shape = np.broadcast_shapes(np.shape(n), np.shape(d))
        return np.exp(self.ensemble.log_loss(self.columns(n, d))).reshape(shape)

    def predict_interval(self, n: ArrayLike, d: ArrayLike, level: float) -> tuple[Floats, Floats]:
        """Central prediction interval of one run's loss at (N, D).

        ln L ± t·√(σ_param² + σ_law² + σ_form² + σ_run²): joint bootstrap of the members' parameters, or what run noise
        makes of them where that is more; distance of the members from their mean beyond what that bootstrap explains;
        law-form error growing with ln(C / largest C), from the backtest; the noise of a single run. t is Student's, with as many degrees of
        freedom as there are different runs more than parameters.

        Returns:
            lower and upper ends, of the broadcast shape.
        """
        centre = np.log(self.predict(n, d))
        half = t_quantile(level, self.freedom) * self.predictive_sd(n, d)
        return np.exp(centre - half), np.exp(centre + half)

    def predictive_sd(self, n: ArrayLike, d: ArrayLike) -> Floats:
        """Standard deviation of ln loss of one run at (N, D), all parts."""
        columns = self.columns(n, d)
        parameter = self.ensemble.parameter_variance(columns, self.run_noise)
        form = self.form.sd(np.log(columns["flops"] / self.largest_flops))
        variance = parameter + form**2 + self.ensemble.disagreement(columns) + self.run_noise**2
        return np.sqrt(variance).reshape(np.broadcast_shapes(np.shape(n), np.shape(d)))

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the interval."""
        return max(self.n_cells - len(self.surface.free), 1)

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
        if len(self.ensemble.members) == 1 and flops_per_token is None and is_chinchilla_like(self.surface):
            return compute_optimal(self.parameters, budget_flops)
        per_token = flops_per_token or (lambda n: 6.0 * n)
        low, high = np.log(_LEAST_N), np.log(budget_flops / 6)
        for _ in range(_ZOOMS):
            grid = np.exp(np.linspace(low, high, _GRID))
            loss = self.predict(grid, budget_flops / per_token(grid))
            best = int(np.argmin(loss))
            low, high = (float(np.log(grid[min(max(best + s, 0), _GRID - 1)])) for s in (-1, 1))
        if not 0 < best < _GRID - 1:
            raise InputError(
                "the fitted law has no optimal N at this budget: one of its terms is missing; "
                "the runs need sizes on both sides of the optimum at some budget"
            )
        n = float(grid[best])
        return n, float(budget_flops / per_token(np.array([n]))[0])


def fit_law(runs: Runs, law: str = "auto", *, draws: int = DRAWS, seed: int = 0, robust: Robust = HUBER) -> FitResult:
    """Fit a law.

    Args:
        law: a name in LAWS, or "auto": the ensemble, its members weighed by backtest.
        draws: bootstrap refits.
        seed: of the bootstrap; equal inputs give equal results.
        robust: the loss of residuals, of the law reported, the ensemble's members (`member_loss`) and their backtest.
    Raises:
        InputError: unknown law, or fewer different runs than it has parameters.
    """
    everything = points(runs)
    asked = get_law("chinchilla" if law == "auto" else law)
    asked.check_columns(everything.columns)
    data = everything.take(frontier_rows(everything)) if asked.on_frontier else everything
    check_enough(data, get_law("tied_no_floor") if law == "auto" and data.n_cells < len(asked.free) else asked)
    few = data.sample(LARGE)
    choice = choose(few, robust) if law == "auto" else judge(Member(law, robust=robust), few)
    form = _reported(choice, data) if law == "auto" else asked
    best = solve(form, data.columns, data.loss, robust)
    values = best.values[0]
    seeds = seed_noise(data)
    if law == "auto":
        ensemble = fit_ensemble(few, choice.weights, max(draws // 5, 2), seed)
    else:
        ensemble = fit_ensemble(few, choice.weights, draws, seed, dict.fromkeys(choice.weights, values))
    noise = _run_noise(ensemble, few, seeds)
    rows = backtest_rows(few, choice, noise)
    sample = bootstrap(form, few, values, draws, seed, robust).values
    named = [form.parameters(v) for v in sample]
    samples = {name: np.array([s[name] for s in named]) for name in form.parameters(values)}
    top = compute_levels(data) == compute_levels(data).max()
    log_ratio = data.x[:, 2] - data.x[:, 0] - data.x[:, 1]
    return FitResult(
        law=form.name,
        parameters=form.parameters(values),
        objective=float(best.objective[0]),
        n_runs=len(data),
        run_ids=data.run_ids,
        residuals=np.log(data.loss) - ensemble.log_loss(data.columns),
        intervals={k: (float(np.quantile(v, 0.025)), float(np.quantile(v, 0.975))) for k, v in samples.items()},
        samples=samples,
        seed_noise=seeds,
        ensemble=ensemble,
        run_noise=noise,
        form=form_error([r for r in rows if r.law == rows[0].law], noise),
        backtest=tuple(r.to_dict() for r in rows),
        approaches=approaches(everything, form.parameters(values) if is_chinchilla_like(form) else None),
        largest_flops=float(np.exp(data.log_flops.max())),
        flops_ratio=float(np.exp(log_ratio[top].mean()) / 6),
        convention=runs.convention,
        source=runs.source,
        starts_agreeing=best.starts_agreeing,
        starts=best.starts,
        condition=best.condition,
        warnings=_warnings(form, data, form.parameters(values), samples, ensemble, rows, bool(best.converged[0])),
        n_cells=data.n_cells,
    )


def is_chinchilla_like(law: Law) -> bool:
    """Whether the law is E + A/N^α + B/D^β, with parameters held or not, so that its optimum is known in closed form."""
    return law.name in ("chinchilla", "tied", "chinchilla_no_floor", "tied_no_floor")


def _reported(choice: Choice, data: Points) -> Law:
    """Chinchilla's law where it was judged or is all there is, else the law with most weight."""
    if "chinchilla" in {m.law for m in choice.weights}:
        return get_law("chinchilla")
    weight: dict[str, float] = {}
    for member, w in choice.weights.items():
        weight[member.law] = weight.get(member.law, 0.0) + w
    return get_law(max(weight, key=lambda name: weight[name]))


def _run_noise(ensemble: Ensemble, data: Points, seeds: float | None) -> float:
    """Robust spread of the residuals, each over what the fit leaves of its noise, larger runs near the envelope counting
    most: the spread there is what a new run on the frontier will have. Seeds of one cell are residuals like others; their
    own spread, known as well as there are second seeds, is for fits that pass through nearly every run."""
    left = ensemble.residual_scale(data)
    free = left > _LEAST_LEFT
    if not free.any():
        return max(seeds or 0.0, _LEAST_NOISE)
    residuals = (np.log(data.loss) - ensemble.log_loss(data.columns))[free] / left[free]
    weights = Member("chinchilla", EMPHASES[1]).weights(data)[free]
    return max(robust_scale(residuals, weights), _LEAST_NOISE)


def _warnings(
    law: Law,
    data: Points,
    parameters: Mapping[str, float],
    samples: Mapping[str, Floats],
    ensemble: Ensemble,
    rows: Sequence[BacktestRow],
    converged: bool,
) -> tuple[str, ...]:
    out = []
    if not converged:
        out.append("the solver's last step was not below its tolerance: treat the parameters as approximate")
    if len(data) > LARGE:
        out.append(f"backtest, intervals and ensemble are from {LARGE:,} of the {len(data):,} runs, drawn at random")
    out += _unidentified(parameters, samples, float(np.median(data.loss)))
    if not law.on_frontier:
        ratio = data.x[:, 1] - data.x[:, 0]
        if ratio.std() < 0.1:
            out.append("all runs lie on one tokens-per-parameter ray: N and D cannot be told apart; add runs off it")
        if len(np.unique(compute_levels(data))) == 1 and np.ptp(data.log_flops) < 0.2:
            out.append("all runs have one compute budget: nothing tells how loss falls with compute")
        missing = [k for k in ("A", "B") if parameters.get(k, 1.0) <= 0]
        if missing:
            out.append(f"{missing[0]} = 0 at the minimum: the runs do not show that term, so there is no optimal N")
    if not rows:
        out.append("too few compute levels for a backtest: the interval's law-form part is a prior, not measured")
    else:
        errors = summary(rows)
        used, simple = errors[rows[0].law], errors.get(BASELINE, np.inf)
        if rows[0].law != BASELINE and simple < used:
            out.append(
                f"in the backtest a pure power law ({BASELINE}) forecast better than {rows[0].law}: "
                f"{100 * simple:.2f}% against {100 * used:.2f}% rms"
            )
    return tuple(out)


def _unidentified(parameters: Mapping[str, float], samples: Mapping[str, Floats], loss: float) -> list[str]:
    """What the bootstrap says is not known."""
    out = []
    if "E" in samples and parameters["E"] > 0 and np.mean(samples["E"] < 0.05 * loss) > 0.025:
        out.append(
            f"E is not identified: its draws reach 0 (E = {parameters['E']:.3g}); losses this far above the floor say "
            "little about it"
        )
    for name, draws in samples.items():
        if name in ("E", "A", "B", "L_inf", "a") or np.ptp(draws) == 0:
            continue
        low, high = np.quantile(draws, (0.05, 0.95))
        if high > 3 * low:
            out.append(f"{name} is weakly identified: 90% of its draws lie between {low:.2g} and {high:.2g}")
    return out
