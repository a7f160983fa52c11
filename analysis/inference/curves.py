"""Loss curves: a law of the whole curve from a few runs under some schedules, and the curve under another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from analysis.inference.solver import HUBER, Robust, solve
from analysis.laws.curves import CURVE_LAWS, Schedule, get_curve_law
from analysis.laws.law import Floats
from scaling.errors import InputError
from scaling.schedule import learning_rates
from scaling.spec import RunSpec
from scaling.sweepdir import RunDir


@dataclass(frozen=True, eq=False)
class Curve:
    """A run's loss at some of its steps."""

    schedule: Schedule
    steps: np.ndarray
    """(n,) int, from 1: the loss is that after so many steps."""
    loss: Floats
    """(n,)"""

    def __post_init__(self) -> None:
        if len(self.steps) != len(self.loss):
            raise InputError(
                f"a curve of {len(self.steps)} steps and {len(self.loss)} losses: one loss for each step"
            )
        bad = ~(np.isfinite(self.loss) & (self.loss > 0))
        if bad.any():
            raise InputError(f"a curve's losses must be positive; {self.loss[bad][0]} at step {self.steps[bad][0]}")

    def after(self, step: int) -> Curve:
        """The points past a step: the laws hold once the fast fall at the start is over."""
        keep = self.steps > max(step, self.schedule.warmup_steps)
        return Curve(self.schedule, self.steps[keep], self.loss[keep])


@dataclass(frozen=True, eq=False)
class CurveFit:
    """A fitted loss-curve law."""

    law: str
    parameters: dict[str, float]
    objective: float
    converged: bool
    n_points: int

    def predict(self, schedule: Schedule, steps: ArrayLike) -> Floats:
        """Loss after so many steps of a schedule."""
        law = get_curve_law(self.law, (schedule,))
        return law.predict(self.parameters, curve=np.zeros(np.shape(steps)), step=steps)

    def errors(self, curve: Curve) -> Floats:
        """(n,): predicted over measured loss, less 1, at the points of a curve."""
        return self.predict(curve.schedule, curve.steps) / curve.loss - 1


def fit_curves(
    curves: Sequence[Curve], law: str = "multi_power", robust: Robust = HUBER, held: dict[str, float] | None = None
) -> CurveFit:
    """Fit one law to all points of one or more curves of the same model, batch and corpus.

    Args:
        held: parameters kept at a value, as forgetting=0.001 in Tissue et al. 2024.

    Raises:
        InputError: no such law; fewer points than twice its parameters; schedules that never fall, which say nothing
            about what a fall is worth.
    """
    base = get_curve_law(law, tuple(c.schedule for c in curves))
    chosen = base.restrict(None, **held) if held else base
    n = sum(len(c.steps) for c in curves)
    if n < 2 * len(chosen.free):
        raise InputError(
            f"{n} points on {len(curves)} curves: the law {law!r} has {len(chosen.free)} free parameters and needs "
            f"{2 * len(chosen.free)} points at least; evaluate more often (eval.points) or give another curve"
        )
    if not any(c.schedule.drops[: c.steps.max()].any() for c in curves):
        raise InputError(
            "the learning rate falls on none of these curves, so nothing says what its fall is worth: "
            "add a curve that decays (schedule.kind wsd, cosine or linear)"
        )
    columns = {
        "curve": np.concatenate([np.full(len(c.steps), float(i)) for i, c in enumerate(curves)]),
        "step": np.concatenate([np.asarray(c.steps, float) for c in curves]),
    }
    found = solve(chosen, columns, np.concatenate([c.loss for c in curves]), robust)
    return CurveFit(law, chosen.parameters(found.values[0]), float(found.objective[0]), bool(found.converged[0]), n)


def best_curve_law(curves: Sequence[Curve], names: Sequence[str] = tuple(CURVE_LAWS)) -> dict[str, float]:
    """Each law's mean absolute relative error on every curve when it is fitted on the others, best first.

    Raises:
        InputError: fewer than two curves.
    """
    if len(curves) < 2:
        raise InputError("one curve: a law is judged on a curve that it was not fitted on, so give two at least")
    errors = {
        name: float(
            np.mean(
                [
                    np.abs(fit_curves([*curves[:i], *curves[i + 1 :]], name).errors(curve)).mean()
                    for i, curve in enumerate(curves)
                ]
            )
        )
        for name in names
    }
    return dict(sorted(errors.items(), key=lambda item: item[1]))


def run_schedule(spec: RunSpec) -> Schedule:
    """The learning rate of each step of a run, done or only planned."""
    return Schedule(np.array(learning_rates(spec)), min(spec.steps_in(spec.schedule.warmup_tokens), spec.steps - 1))


def load_curve(run: RunDir) -> Curve:
    """Held-out loss along a run, after its warm-up.

    Raises:
        InputError: the run has no evaluation after its warm-up.
    """
    schedule = run_schedule(run.spec())
    rows = [(r["step"], r["val_loss"]) for r in run.metrics() if r.get("val_loss")]
    curve = Curve(schedule, np.array([s for s, _ in rows], int), np.array([v for _, v in rows], float)).after(0)
    if not len(curve.steps):
        raise InputError(
            f"{run.path}: no evaluation after the warm-up's {schedule.warmup_steps} steps in metrics.jsonl"
        )
    return curve
