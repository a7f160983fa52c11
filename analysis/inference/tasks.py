"""Task accuracy of a large model in two steps (Bhagia et al. 2024, arXiv 2412.04403): the task's loss in bits per byte from
N and D, then accuracy from the loss; and how far a task can be trusted for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from analysis.inference.solver import HUBER, ROBUST, Robust, log_predictions, predictions, resolve, solve
from analysis.laws import get_law
from analysis.laws.law import Floats, Law, complete
from analysis.laws.tasks import ACCURACY
from scaling.errors import InputError

STEP1_LAWS = ("chinchilla", "tied")
"""Forms that may give the loss: `choose_step1` takes the one that predicts the largest size better from the others."""
_STEP2_LOSS = ROBUST["squared"]
_DRAWS = 500


@dataclass(frozen=True, eq=False)
class TaskRuns:
    """One task's results on n runs."""

    task: str
    n_params: Floats
    n_tokens: Floats
    task_loss: Floats
    """(n,): of the right answer, in bits per byte (any unit that is the same for all)."""
    accuracy: Floats | None = None
    """(n,) in [0, 1]; None where only step 1 is wanted."""

    def __post_init__(self) -> None:
        n = len(self.task_loss)
        for name in ("n_params", "n_tokens", "task_loss"):
            values = np.asarray(getattr(self, name), float)
            if len(values) != n or not (np.isfinite(values).all() and (values > 0).all()):
                raise InputError(f"task {self.task!r}: {name} must be one positive number for each of the {n} runs")
        if self.accuracy is not None:
            accuracy = np.asarray(self.accuracy, float)
            if len(accuracy) != n or not ((accuracy >= 0) & (accuracy <= 1)).all():
                raise InputError(
                    f"task {self.task!r}: accuracy must be one number in [0, 1] for each of the {n} runs, not percent"
                )

    @property
    def columns(self) -> dict[str, Floats]:
        """Variables of the loss law."""
        return complete({"n_params": self.n_params, "n_tokens": self.n_tokens})

    def take(self, rows: np.ndarray) -> TaskRuns:
        """Some of the runs."""
        accuracy = None if self.accuracy is None else self.accuracy[rows]
        return TaskRuns(self.task, self.n_params[rows], self.n_tokens[rows], self.task_loss[rows], accuracy)


@dataclass(frozen=True, eq=False)
class LossFit:
    """Step 1."""

    law: str
    parameters: dict[str, float]
    values: Floats
    """(p,)"""
    draws: Floats
    """(R, p): bootstrap over runs."""
    noise: float
    """Standard deviation of ln loss about the law."""

    def predict(self, n: ArrayLike, d: ArrayLike) -> Floats:
        """Task loss at N and D."""
        return get_law(self.law).predict(self.parameters, n, d)


@dataclass(frozen=True)
class TaskPrediction:
    """Accuracy of one model at one task."""

    task_loss: float
    accuracy: float
    interval_90: tuple[float, float]
    """Of the accuracy that an evaluation would give: parameters of both steps and their residuals."""


@dataclass(frozen=True, eq=False)
class TaskFit:
    """Both steps."""

    task: str
    step1: LossFit
    step2: dict[str, float]
    step2_draws: Floats
    """(R, 4): of the same resamples as step 1's."""
    step2_noise: float
    """Standard deviation of accuracy about the sigmoid."""
    n_runs: int

    def accuracy(self, task_loss: ArrayLike) -> Floats:
        """Step 2 alone."""
        return ACCURACY.predict(self.step2, task_loss=task_loss)

    def predict(self, n: float, d: float, seed: int = 0) -> TaskPrediction:
        """The chain at one N and D."""
        loss = float(self.step1.predict(n, d))
        point = float(self.accuracy(loss))
        rng = np.random.default_rng(seed)
        law, columns = get_law(self.step1.law), complete({"n_params": [n], "n_tokens": [d]})
        shift = log_predictions(law, self.step1.draws, columns)[:, 0] - np.log(loss)
        noise1, noise2 = rng.standard_normal((2, len(shift)))
        losses = loss * np.exp(self._widened(len(law.free)) * shift + self.step1.noise * noise1)
        moved = _sigmoid(self.step2_draws, losses)
        same = _sigmoid(self.step2_draws, np.full(len(shift), loss)) - point
        moved += (self._widened(len(ACCURACY.free)) - 1) * same + self.step2_noise * noise2
        low, high = np.quantile(moved, [0.05, 0.95])
        return TaskPrediction(loss, point, (float(max(low, 0.0)), float(min(high, 1.0))))

    def _widened(self, p: int) -> float:
        """What a bootstrap of n residuals about p parameters is short of."""
        return float(np.sqrt(self.n_runs / max(self.n_runs - p, 1)))


def _sigmoid(parameters: Floats, task_loss: Floats) -> Floats:
    """Accuracy of R parameter vectors at R losses."""
    a, b, k, middle = parameters.T
    return 0.5 * a * (1 + np.tanh(0.5 * k * (task_loss - middle))) + b


def choose_step1(runs: TaskRuns | Sequence[TaskRuns], robust: Robust = HUBER) -> str:
    """The form of step 1 with the least mean error on the largest size, fitted on the smaller ones, over all tasks given.

    A few runs a task cannot tell forms apart, many tasks of one ladder can. With fewer than three sizes, or too few
    runs below the largest, the Chinchilla form.
    """
    tasks = [runs] if isinstance(runs, TaskRuns) else list(runs)
    errors = {name: [_held_out_loss_error(t, name, robust) for t in tasks] for name in STEP1_LAWS}
    known = {name: [e for e in found if e is not None] for name, found in errors.items()}
    if not all(known.values()):
        return STEP1_LAWS[0]
    return min(known, key=lambda name: float(np.mean(known[name])))


def fit_loss(
    runs: TaskRuns, law: str = "chinchilla", robust: Robust = HUBER, weights: Floats | None = None
) -> LossFit:
    """Step 1: the task's loss by a law of N and D.

    Args:
        weights: (R, n) of bootstrap resamples; none when None.

    Raises:
        InputError: fewer runs than parameters and one.
    """
    form = get_law(law)
    _enough(runs, form)
    values = solve(form, runs.columns, runs.task_loss, robust).values
    residual = np.log(runs.task_loss) - log_predictions(form, values, runs.columns)[0]
    noise = float(np.sqrt(residual @ residual / max(len(residual) - len(form.free), 1)))
    draws = (
        values if weights is None else resolve(form, runs.columns, runs.task_loss, values[0], weights, robust).values
    )
    return LossFit(law, form.parameters(values[0]), values[0], draws, noise)


def fit_task(
    runs: TaskRuns, law: str | None = None, robust: Robust = HUBER, draws: int = _DRAWS, seed: int = 0
) -> TaskFit:
    """Both steps, and a Bayesian bootstrap over runs that both share.

    Args:
        law: of step 1; `choose_step1` of this task when None. Give one choice for all tasks of a ladder.

    Raises:
        InputError: no accuracies, too few runs, or accuracies that are all the same.
    """
    if runs.accuracy is None:
        raise InputError(f"task {runs.task!r}: step 2 needs the accuracy of every run beside its task loss")
    _enough(runs, ACCURACY)
    if np.ptp(runs.accuracy) == 0:
        raise InputError(
            f"task {runs.task!r}: every run has accuracy {runs.accuracy[0]:.4g}: no run does better than another yet, so "
            "nothing says at what loss the task is learned; use larger runs or predict its loss only"
        )
    n = len(runs.task_loss)
    weights = n * np.random.default_rng(seed).dirichlet(np.ones(n), size=draws)
    step1 = fit_loss(runs, law or choose_step1(runs, robust), robust, weights)
    columns = {"task_loss": runs.task_loss}
    best = solve(ACCURACY, columns, runs.accuracy, _STEP2_LOSS).values
    many = resolve(ACCURACY, columns, runs.accuracy, best[0], weights, _STEP2_LOSS).values
    residual = runs.accuracy - predictions(ACCURACY, best, columns)[0]
    noise = float(np.sqrt(residual @ residual / max(n - len(ACCURACY.free), 1)))
    return TaskFit(runs.task, step1, ACCURACY.parameters(best[0]), many, noise, n)


@dataclass(frozen=True)
class Reliability:
    """What a task is good for in a ladder."""

    task: str
    loss_noise: float | None
    """Relative standard deviation of the task loss over a run's last checkpoints; None where they were not given."""
    accuracy_noise: float | None
    """Standard deviation of accuracy over them."""
    loss_error: float | None
    """Mean absolute relative error of step 1 on the largest size, fitted on the smaller; None with too few runs for it."""
    accuracy_error: float | None
    """Mean absolute error of the chain there."""
    signal_to_noise: float | None
    """Range of accuracy over the runs, over its noise."""


def reliability(
    runs: TaskRuns,
    last_losses: ArrayLike | None = None,
    last_accuracies: ArrayLike | None = None,
    law: str | None = None,
) -> Reliability:
    """Noise of the last checkpoints of one run, and the error of predicting the largest size from the smaller.

    Args:
        last_losses: task loss of a run's last checkpoints, ten or so.
        last_accuracies: accuracy of them.
    """
    name = law or choose_step1(runs)
    loss_noise = None if last_losses is None else _deviation(last_losses) / float(np.mean(np.asarray(last_losses)))
    accuracy_noise = None if last_accuracies is None else _deviation(last_accuracies)
    small = runs.n_params < runs.n_params.max()
    accuracy_error = None
    if runs.accuracy is not None and small.sum() > len(ACCURACY.free) and np.ptp(runs.accuracy[small]) > 0:
        below, largest = runs.take(small), runs.take(~small)
        if small.sum() > len(get_law(name).free):
            chain = fit_task(below, name, draws=1)
            said = chain.accuracy(chain.step1.predict(largest.n_params, largest.n_tokens))
            accuracy_error = float(np.abs(said - runs.accuracy[~small]).mean())
    signal = float(np.ptp(runs.accuracy)) / accuracy_noise if runs.accuracy is not None and accuracy_noise else None
    return Reliability(
        runs.task, loss_noise, accuracy_noise, _held_out_loss_error(runs, name, HUBER), accuracy_error, signal
    )


def _deviation(values: ArrayLike) -> float:
    array = np.asarray(values, float)
    if array.ndim != 1 or len(array) < 2:
        raise InputError(f"the last checkpoints: {array.size} given; their noise needs two at least, ten are better")
    return float(array.std(ddof=1))


def _held_out_loss_error(runs: TaskRuns, law: str, robust: Robust) -> float | None:
    small = runs.n_params < runs.n_params.max()
    if len(np.unique(runs.n_params)) < 3 or small.sum() <= len(get_law(law).free):
        return None
    fit = fit_loss(runs.take(small), law, robust)
    return float(
        np.abs(fit.predict(runs.n_params[~small], runs.n_tokens[~small]) / runs.task_loss[~small] - 1).mean()
    )


def _enough(runs: TaskRuns, law: Law) -> None:
    n = len(runs.task_loss)
    if n <= len(law.free):
        raise InputError(
            f"task {runs.task!r}: {n} runs for the {len(law.free)} parameters of {law.name!r}: {len(law.free) + 1} are the "
            "least; a ladder of four sizes and four lengths has 16"
        )
