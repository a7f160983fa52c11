"""From the loss of a task to its accuracy: a sigmoid (Grattafiori et al. 2024, arXiv 2407.21783; Bhagia et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from analysis.laws.law import Columns, Evaluation, Floats, Law, Model, Parameter


@dataclass(frozen=True)
class AccuracyLaw(Law):
    """accuracy = a/(1 + e^(−k·(L − L0))) + b. b is the accuracy at a low loss, b + a at a high one, which is chance's."""

    name: str = "task_accuracy"
    formula: str = "accuracy = a/(1 + e^(−k·(L − L0))) + b"
    source: str = "Bhagia et al. 2024, arXiv 2412.04403, step 2"
    log_residual: ClassVar[bool] = False

    @property
    def domain(self) -> tuple[Parameter, ...]:
        """a ≤ 0 and b in [0, 1] are linear."""
        return (
            Parameter("a", -1.0, 0.0, linear=True),
            Parameter("b", 0.0, 1.0, linear=True),
            Parameter("k", start=(1.0, 30.0)),
            Parameter("L0", -np.inf, start=(-0.5, 1.0)),
        )

    @property
    def variables(self) -> tuple[str, ...]:
        """The task's loss."""
        return ("task_loss",)

    def bind(self, columns: Columns, centre: bool = True) -> Model:
        """The law at n losses."""
        return _AccuracyModel(self.domain, columns["task_loss"])


class _AccuracyModel(Model):
    def __init__(self, domain: tuple[Parameter, ...], task_loss: Floats) -> None:
        low, high = float(task_loss.min()), float(task_loss.max())
        span = max(high - low, 1e-9)
        starts = {"k": (1 / span, 30 / span), "L0": (low - 0.5 * span, high)}
        self.domain = tuple(replace(q, start=starts.get(q.name, q.start)) for q in domain)
        self.task_loss = task_loss

    def evaluate(self, vectors: Floats) -> Evaluation:
        a, b, k, middle = (vectors[:, i : i + 1] for i in range(4))
        shift = self.task_loss - middle
        risen = 0.5 * (1 + np.tanh(0.5 * k * shift))
        slope = a * risen * (1 - risen)
        return Evaluation(a * risen + b, np.stack([risen, np.ones_like(risen), slope * shift, -slope * k], axis=1))


ACCURACY = AccuracyLaw()
"""The only one."""
