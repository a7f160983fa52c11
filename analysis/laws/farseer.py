"""Farseer's law: a floor, a coefficient and an exponent of data that each depend on N."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import numpy as np

from analysis.laws.law import Columns, Evaluation, Floats, Law, Model, Parameter, spread

_SMALL = 1e-6
"""Least |p| of a power N^p: below, a curve is a straight line in ln N, whose a and b would be infinite."""
_STEEPEST, _HIGHEST = 5.0, 20.0
"""Largest ln of the exponent of D and ln of a term of the loss: what keeps a trial step finite."""

_SEARCHED = (
    Parameter("alpha", start=(0.05, 1.0)),
    Parameter("beta", start=(0.05, 1.0)),
    Parameter("exponent_slope", start=(-0.15, 0.15)),
    Parameter("data_slope", start=(-0.2, 0.2)),
)
"""What the starts differ in: exponents of N in the floor and of D at N0, slopes in ln N of the latter's ln and of the data term's."""


@dataclass(frozen=True)
class FarseerLaw(Law):
    """L = e^(a3·N^γ + b3) + e^(a2·N^β + b2)·D^(−e^(a1·N^α + b1)), Farseer 2025, arXiv 2506.10972.

    The exponents α, β, γ may be negative. Bound to data, each a·N^p + b is v + s·((N/N0)^p − 1)/p around the geometric
    mean N0 of the runs, v its value and s its slope in ln N there: a and b of a fit may be huge and nearly cancel.
    """

    name: str = "farseer"
    formula: str = "L = e^(a3·N^γ + b3) + e^(a2·N^β + b2)·D^(−e^(a1·N^α + b1))"
    source: str = "Farseer 2025, arXiv 2506.10972"

    @property
    def domain(self) -> tuple[Parameter, ...]:
        """Three curves in N: of the exponent of D, of its coefficient, of the floor."""
        return tuple(
            parameter
            for k, power in ((1, "alpha"), (2, "beta"), (3, "gamma"))
            for parameter in (
                Parameter(f"a{k}", -np.inf, start=(-0.1, 0.1)),
                Parameter(f"b{k}", -np.inf, start=(-1.0, 1.0)),
                Parameter(power, -2.0, 2.0, start=(-0.1, 0.1)),
            )
        )

    @property
    def variables(self) -> tuple[str, ...]:
        """N and D."""
        return "n_params", "n_tokens"

    def bind(self, columns: Columns, centre: bool = True) -> Model:
        """The law at n rows of data."""
        return FarseerModel(self.domain, columns, centre)


class FarseerModel(Model):
    """Centred: (s, v, p) of each curve, those of the second being value and slope of ln e^(…)·D^(…) at N0, D0; else (a, b, p)."""

    starts = 32

    def __init__(self, domain: tuple[Parameter, ...], columns: Columns, centre: bool) -> None:
        self.domain, self.centred = domain, centre
        log_n, self.log_d = np.log(columns["n_params"]), np.log(columns["n_tokens"])
        self.log_n0, self.log_d0 = (float(log_n.mean()), float(self.log_d.mean())) if centre else (0.0, 0.0)
        self.x = log_n - self.log_n0

    def inward(self, values: Floats) -> Floats:
        out = np.array(values, float)
        for k in (0, 3, 6):
            at_centre = values[..., k] * np.exp(values[..., k + 2] * self.log_n0)
            out[..., k], out[..., k + 1] = at_centre * values[..., k + 2], values[..., k + 1] + at_centre
        return self._shifted(out, -1.0)

    def outward(self, vectors: Floats) -> Floats:
        out = self._shifted(np.array(vectors, float), 1.0)
        for k in (0, 3, 6):
            slope, power = out[..., k].copy(), out[..., k + 2]
            power = out[..., k + 2] = np.where(np.abs(power) < _SMALL, np.copysign(_SMALL, power), power)
            out[..., k] = slope / power * np.exp(-power * self.log_n0)
            out[..., k + 1] -= slope / power
        return out

    def plain(self, index: int) -> Model:
        if index % 3 == 2:
            return self
        out = copy(self)
        out.x, out.log_n0, out.log_d0, out.centred = self.x + self.log_n0, 0.0, 0.0, False
        return out

    def _shifted(self, curves: Floats, sign: float) -> Floats:
        """The second curve with the D0 of the power of D taken out of it (−) or put back (+)."""
        moved = sign * np.exp(np.minimum(curves[..., 1], _STEEPEST)) * self.log_d0
        curves[..., 3] += moved * curves[..., 0]
        curves[..., 4] += moved
        return curves

    def evaluate(self, vectors: Floats) -> Evaluation:
        curves = self._shifted(np.array(vectors, float), 1.0) if self.centred else vectors
        (u, du), (v, dv), (w, dw) = (self._curve(curves[:, k : k + 3]) for k in (0, 3, 6))
        exponent, floor = np.exp(np.minimum(u, _STEEPEST)), np.exp(np.minimum(w, _HIGHEST))
        data = np.exp(np.minimum(v - exponent * self.log_d, _HIGHEST))
        jacobian = np.concatenate(
            [-(data * exponent * self.log_d)[:, None] * du, data[:, None] * dv, floor[:, None] * dw], axis=1
        )
        if self.centred:
            moved = (np.exp(np.minimum(vectors[:, 1], _STEEPEST)) * self.log_d0)[:, None]
            slope = vectors[:, 0, None]
            jacobian[:, 0] += moved * jacobian[:, 3]
            jacobian[:, 1] += moved * (jacobian[:, 4] + slope * jacobian[:, 3])
        return Evaluation(data + floor, jacobian)

    def _curve(self, parameters: Floats) -> tuple[Floats, Floats]:
        """One curve in N, (B, n), and its gradient (B, 3, n)."""
        first, second, p = parameters.T[:, :, None]
        px = p * self.x
        if not self.centred:
            power = np.exp(px)
            return first * power + second, np.stack([power, np.ones_like(px), first * power * self.x], axis=1)
        small = np.abs(px) < 1e-4
        safe = np.where(small, 1.0, p)
        rise = np.where(small, self.x * (1 + px / 2), np.expm1(px) / safe)
        bend = np.where(small, self.x**2 * (0.5 + px / 3), (self.x * np.exp(px) - rise) / safe)
        return second + first * rise, np.stack([rise, np.ones_like(px), first * bend], axis=1)

    def search(self, count: int, loss: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """The floor from Chinchilla's E + A/N^α by its value, slope and bend at N0; E, A and the data term's size are linear."""
        table = spread(_SEARCHED, 4 * count)
        alpha, beta = table[:, 0], table[:, 1]
        vectors = np.zeros((len(table), 9))
        vectors[:, 0], vectors[:, 1], vectors[:, 3] = table[:, 2], np.log(beta), table[:, 3]
        vectors[:, 2] = vectors[:, 5] = 0.1
        vectors[:, 7] = -np.inf
        data = self.evaluate(vectors).y
        basis = np.stack(np.broadcast_arrays(1.0, np.exp(-alpha[:, None] * self.x), data), axis=1)
        relative = basis / loss
        gram = np.matmul(relative, relative.transpose(0, 2, 1))
        gram += 1e-9 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(3)
        e, a, b = np.maximum(np.linalg.solve(gram, relative.sum(2)[:, :, None])[:, :, 0], 1e-3 * loss.min()).T
        vectors[:, 4], vectors[:, 7] = np.log(b), np.log(e + a)
        vectors[:, 6] = -alpha * a / (e + a)
        vectors[:, 8] = -alpha * e / (e + a)
        none = np.empty((len(alpha), 0, len(loss)))
        return vectors, none, np.empty((len(alpha), len(loss))), np.empty((len(alpha), len(loss)))
