"""Loss curves under any learning-rate schedule: the annealing law and the multi-power law.

Both say what the loss is after each step of a run of one model on one corpus, whatever the schedule, so that a curve under
one schedule forecasts another. Columns of their data: `curve`, an index into the law's schedules, and `step`, counted from 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.laws.law import Columns, Evaluation, Floats, Law, Model, Parameter
from scaling.errors import InputError, unknown

_BLOCKS = 256
"""Steps of a schedule are merged into about this many blocks for the multi-power law's sum over steps."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """The learning rate of every step of a run."""

    lr: Floats
    """(T,): of steps 1 … T."""
    warmup_steps: int = 0
    """The laws hold after these; the rise of the learning rate in them counts towards S1 only."""

    def __post_init__(self) -> None:
        lr = np.asarray(self.lr, float)
        object.__setattr__(self, "lr", lr)
        if lr.ndim != 1 or len(lr) < 2:
            raise InputError(f"a schedule of shape {lr.shape}: give one learning rate for each step, at least two")
        if not np.isfinite(lr).all() or (lr < 0).any() or not lr.any():
            raise InputError(
                "a schedule's learning rates must be finite, not negative and not all 0; "
                f"received {lr.min():.4g} to {lr.max():.4g}"
            )
        if not 0 <= self.warmup_steps < len(lr):
            raise InputError(
                f"warmup_steps = {self.warmup_steps}: must be in [0, {len(lr)}), the steps of the schedule"
            )

    @cached_property
    def area(self) -> Floats:
        """(T + 1,): S1 after each step, Σ η, from 0."""
        return np.concatenate([[0.0], np.cumsum(self.lr)])

    @cached_property
    def drops(self) -> Floats:
        """(T,): η_{k−1} − η_k; 0 in the warm-up and at the first step after it."""
        drops = -np.diff(self.lr, prepend=self.lr[0])
        drops[: self.warmup_steps + 1] = 0.0
        return drops

    def annealing(self, forgetting: float) -> tuple[Floats, Floats]:
        """S2 after each step, Σ_{i≤s} Σ_{k≤i} (η_{k−1} − η_k)·λ^(i−k) with λ = 1 − forgetting, and its derivative by it.

        The inner sum is m_i = λ·m_{i−1} + drop_i, a first-order filter; so is its derivative.
        Returns: (T + 1,) each, from 0.
        """
        from scipy.signal import lfilter

        recursion = [1.0, forgetting - 1.0]
        momentum = lfilter([1.0], recursion, self.drops)
        slope = lfilter([0.0, -1.0], recursion, momentum)
        return np.concatenate([[0.0], np.cumsum(momentum)]), np.concatenate([[0.0], np.cumsum(slope)])


@dataclass(frozen=True, eq=False)
class CurveLaw(Law):
    """A law of loss against step, with the schedules that its `curve` column counts."""

    name: str
    formula: str
    source: str
    parameter_domain: tuple[Parameter, ...]
    model: type[_CurveModel]
    schedules: tuple[Schedule, ...] = ()

    @property
    def domain(self) -> tuple[Parameter, ...]:
        """The free parameters."""
        return self.parameter_domain

    @property
    def variables(self) -> tuple[str, ...]:
        """Index of the schedule, and step."""
        return ("curve", "step")

    def under(self, schedules: tuple[Schedule, ...]) -> CurveLaw:
        """The law with these schedules."""
        return CurveLaw(self.name, self.formula, self.source, self.parameter_domain, self.model, schedules)

    def bind(self, columns: Columns, centre: bool = True) -> Model:
        """The law at n points of its curves.

        Raises:
            InputError: a curve or step that the schedules do not have, or a step of the warm-up.
        """
        curve, step = (np.asarray(columns[name]).astype(int) for name in ("curve", "step"))
        if len(curve) and not (curve.min() >= 0 and curve.max() < len(self.schedules)):
            raise InputError(f"curve {curve.max()}: the law has schedules 0 … {len(self.schedules) - 1}")
        points = []
        for index in np.unique(curve):
            rows, schedule = np.flatnonzero(curve == index), self.schedules[index]
            steps = step[rows]
            if steps.min() <= schedule.warmup_steps or steps.max() > len(schedule.lr):
                raise InputError(
                    f"steps {steps.min()} to {steps.max()} of curve {index}: the law holds from step "
                    f"{schedule.warmup_steps + 1}, after warm-up, to {len(schedule.lr)}, the end of the schedule"
                )
            points.append((rows, steps, schedule))
        return self.model(self.parameter_domain, points, centre)


Points = tuple[np.ndarray, np.ndarray, Schedule]
"""Rows of the data, their steps and their schedule."""


class _CurveModel(Model):
    """Points by curve: rows, steps, schedule. The first three parameters are L0, A, α of L0 + A·S1^−α, S1 in units of its
    geometric mean where centred."""

    def __init__(self, domain: tuple[Parameter, ...], points: list[Points], centre: bool) -> None:
        self.domain, self.points = domain, points
        self.n = sum(len(rows) for rows, _, _ in points)
        log_area = np.empty(self.n)
        for rows, steps, schedule in points:
            log_area[rows] = np.log(schedule.area[steps])
        self.centre = float(log_area.mean()) if centre else 0.0
        self.log_area = log_area - self.centre

    def inward(self, values: Floats) -> Floats:
        return self._scaled(values, -1.0)

    def outward(self, vectors: Floats) -> Floats:
        return self._scaled(vectors, 1.0)

    def _scaled(self, p: Floats, sign: float) -> Floats:
        out = np.array(p, float)
        out[..., 1] *= np.exp(sign * p[..., 2] * self.centre)
        return out

    def evaluate(self, vectors: Floats) -> Evaluation:
        level, size, alpha = vectors[:, :1], vectors[:, 1:2], vectors[:, 2:3]
        power = np.exp(-alpha * self.log_area)
        jacobian = np.empty((len(vectors), len(self.domain), self.n))
        jacobian[:, 0] = 1.0
        jacobian[:, 1] = power
        jacobian[:, 2] = -size * power * self.log_area
        fallen = np.empty((len(vectors), self.n))
        for b, vector in enumerate(vectors):
            for rows, value, gradient in self.fall(vector):
                fallen[b, rows] = value
                jacobian[b, 3:, rows] = -gradient.T
        return Evaluation(level + size * power - fallen, jacobian)

    @abstractmethod
    def fall(self, vector: Floats) -> list[tuple[np.ndarray, Floats, Floats]]:
        """By curve: rows, what the drops of the learning rate take off the loss (n,), its gradient (parameters 3…, n)."""


class _AnnealingModel(_CurveModel):
    def fall(self, vector: Floats) -> list[tuple[np.ndarray, Floats, Floats]]:
        size, forgetting = vector[3], vector[4]
        out = []
        for rows, steps, schedule in self.points:
            area, slope = schedule.annealing(forgetting)
            out.append((rows, size * area[steps], np.stack([area[steps], size * slope[steps]])))
        return out


class _MultiPowerModel(_CurveModel):
    """The sum over steps runs over blocks of consecutive steps that end at the points, each with its total drop and the
    drop-weighted means of ln η_k and of S1 before k."""

    def __init__(self, domain: tuple[Parameter, ...], points: list[Points], centre: bool) -> None:
        super().__init__(domain, points, centre)
        self.blocks = [_blocks(schedule, steps) for _, steps, schedule in points]

    def fall(self, vector: Floats) -> list[tuple[np.ndarray, Floats, Floats]]:
        size, scale, beta, gamma = vector[3:]
        out = []
        for (rows, _, _), (drop, log_lr, since) in zip(self.points, self.blocks, strict=True):
            x = since * np.exp(-gamma * log_lr)  # (n, K)
            log_grown = np.log1p(scale * x)
            left = np.exp(-beta * log_grown)
            by_x = left * x / (1 + scale * x)
            gain = (1 - left) @ drop
            gradient = np.stack(
                [
                    gain,
                    size * beta * (by_x @ drop),
                    size * ((left * log_grown) @ drop),
                    -size * beta * scale * (by_x @ (drop * log_lr)),
                ]
            )
            out.append((rows, size * gain, gradient))
        return out


def _blocks(schedule: Schedule, steps: np.ndarray) -> tuple[Floats, Floats, Floats]:
    """Drop (K,), ln η (K,) of each block of steps, and Σ η from its steps on to each point (n, K), 0 for blocks after it."""
    falling: np.ndarray = np.flatnonzero(schedule.drops) + 1
    if not len(falling):
        return np.zeros(1), np.zeros(1), np.zeros((len(steps), 1))
    even = np.quantile(falling, np.linspace(0, 1, min(_BLOCKS, len(falling)) + 1)).astype(int)
    ends = np.unique(np.concatenate([even, steps]))
    block = np.searchsorted(ends, falling)  # a block is (end before, end]
    drop = schedule.drops[falling - 1]
    weight = np.abs(drop)
    total = np.bincount(block, weight, len(ends) + 1)
    used = np.flatnonzero(total)
    lr = np.maximum(schedule.lr[falling - 1], schedule.lr[schedule.lr > 0].min())  # at a final 0 S is 0 too

    def mean(values: Floats) -> Floats:
        out: Floats = np.bincount(block, weight * values, len(ends) + 1)[used] / total[used]
        return out

    since = schedule.area[steps][:, None] - mean(schedule.area[falling - 1])
    last = np.append(ends, len(schedule.lr))[used]
    since = np.where(last <= steps[:, None], np.maximum(since, 0.0), 0.0)
    return np.bincount(block, drop, len(ends) + 1)[used].astype(float), mean(np.log(lr)), since


_L0 = Parameter("L0", linear=True)
_A = Parameter("A", linear=True)
_ALPHA = Parameter("alpha", 0.01, 3.0, start=(0.1, 1.5))

CURVE_LAWS: Mapping[str, CurveLaw] = {
    law.name: law
    for law in (
        CurveLaw(
            "annealing",
            "L(s) = L0 + A·S1^−α − C·S2, S1 = Σ_{i≤s} η_i, S2 = Σ_{i≤s} Σ_{k≤i} (η_{k−1} − η_k)·λ^(i−k), λ = 1 − forgetting",
            "Tissue et al. 2024, arXiv 2408.11029 (there λ = .999 and not fitted)",
            (
                _L0, _A, _ALPHA, Parameter("C", linear=True),
                Parameter("forgetting", 1e-6, 0.9, start=(3e-4, 0.3)),
            ),
            _AnnealingModel,
        ),
        CurveLaw(
            "multi_power",
            "L(t) = L0 + A·S1(t)^−α − B·Σ_{k≤t} (η_{k−1} − η_k)·(1 − (C·η_k^−γ·S_k(t) + 1)^−β), S_k(t) = Σ_{τ=k..t} η_τ",
            "Luo et al. 2025, arXiv 2503.12811; S1 has the warm-up's sum in it",
            (
                _L0, _A, _ALPHA, Parameter("B", linear=True), Parameter("C", start=(0.03, 30.0)),
                Parameter("beta", 0.01, 5.0, start=(0.1, 1.5)), Parameter("gamma", 0.0, 2.0, start=(0.0, 1.0)),
            ),
            _MultiPowerModel,
        ),
    )
}  # fmt: skip
"""Laws of the loss curve by name, without schedules."""


def get_curve_law(name: str, schedules: tuple[Schedule, ...]) -> CurveLaw:
    """The law of that name under these schedules.

    Raises:
        InputError: no such law; lists all.
    """
    if name not in CURVE_LAWS:
        raise unknown("loss-curve law", name, CURVE_LAWS)
    return CURVE_LAWS[name].under(schedules)
