"""Laws that are a sum of power terms, L = Σ_k c_k · Π_v v^(−exponent), with an optional power around the sum.

The coefficients c_k are non-negative and enter linearly, so that a solver can eliminate them (variable projection).
Bound to data, log variables are centred: a coefficient is then its term's size at the centre of the runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from analysis.laws.law import Columns, Evaluation, Floats, Law, Model, Parameter, spread
from scaling.errors import InputError

EXPONENT_RANGE = (0.01, 3.0)
"""Domain of an exponent; below it a power term is indistinguishable from the constant."""


@dataclass(frozen=True)
class Term:
    """coefficient · Π variable^(−exponent); an exponent is a name, or a number where it is held. No powers: a constant."""

    coefficient: str
    powers: tuple[tuple[str, str | float], ...] = ()


@dataclass(frozen=True)
class SurfaceLaw(Law):
    """A sum of power terms. Parameters: the coefficients (≥ 0), then the exponents (in EXPONENT_RANGE), then γ."""

    name: str
    formula: str
    source: str
    terms: tuple[Term, ...]
    on_frontier: bool = False
    fixed: tuple[tuple[str, str | float], ...] = ()
    outer: str | None = None
    """Name of γ in L = constants + (Σ other terms)^γ."""
    nested: tuple[str, tuple[tuple[str, float], ...]] | None = None

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names of the coefficients, in the terms' order."""
        return tuple(t.coefficient for t in self.terms)

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the exponents, in order of first use."""
        return tuple(dict.fromkeys(e for t in self.terms for _, e in t.powers if isinstance(e, str)))

    @property
    def domain(self) -> tuple[Parameter, ...]:
        """Coefficients, exponents, γ."""
        constants = {t.coefficient for t in self.terms if not t.powers}
        linear = [Parameter(c, linear=self.outer is None or c in constants) for c in self.coefficients]
        powers = [Parameter(e, *EXPONENT_RANGE) for e in self.exponents]
        outer = [Parameter(self.outer, 0.02, 3.0, start=(0.05, 1.0))] if self.outer else []
        return (*linear, *powers, *outer)

    @property
    def variables(self) -> tuple[str, ...]:
        """The variables of its powers, in order of first use."""
        return tuple(dict.fromkeys(v for t in self.terms for v, _ in t.powers))

    def bind(self, columns: Columns, centre: bool = True) -> Model:
        """The law at n rows of data."""
        return (SurfaceModel if self.outer is None else OuterModel)(self, columns, centre)

    def _restrict(self, name: str, fixed: Mapping[str, str | float]) -> Law:
        """Held and shared exponents and dropped terms stay sums of powers, with all that a solver knows of them."""
        plain = all(isinstance(v, str) or v == 0 for k, v in fixed.items() if k in self.coefficients)
        if not plain or self.outer in fixed or any(v in self.coefficients for v in fixed.values()):
            return super()._restrict(name, fixed)
        terms = tuple(
            replace(t, powers=tuple((v, fixed.get(e, e) if isinstance(e, str) else e) for v, e in t.powers))
            for t in self.terms
            if fixed.get(t.coefficient) != 0
        )
        held = ", ".join(f"{k} = {v}" for k, v in fixed.items())
        return replace(
            self, name=name, formula=f"{self.formula}, {held}", terms=terms, nested=None,
            fixed=(*self.fixed, *fixed.items()),
        )  # fmt: skip


class SurfaceModel(Model):
    """A sum of powers at n rows: ŷ = Σ_k c_k·φ_k, φ_k = exp(−Σ_j θ_j·z_kj − z0_k)."""

    def __init__(self, law: SurfaceLaw, columns: Columns, centre: bool) -> None:
        self.domain = law.domain
        self.k, self.m = len(law.terms), len(law.exponents)
        n = len(next(iter(columns.values())))
        self.z = np.zeros((self.k, self.m, n))
        held = np.zeros((self.k, n))
        for k, term in enumerate(law.terms):
            for variable, exponent in term.powers:
                log_v = np.log(columns[variable])
                if isinstance(exponent, str):
                    self.z[k, law.exponents.index(exponent)] += log_v
                else:
                    held[k] += exponent * log_v
        self.centre = self.z.mean(2) if centre else np.zeros((self.k, self.m))
        self.held_centre = held.mean(1) if centre else np.zeros(self.k)
        self.z -= self.centre[:, :, None]
        held -= self.held_centre[:, None]
        self.held = held if held.any() else None

    def inward(self, values: Floats) -> Floats:
        return self._scaled(values, -1.0)

    def outward(self, vectors: Floats) -> Floats:
        return self._scaled(vectors, 1.0)

    def _scaled(self, p: Floats, sign: float) -> Floats:
        k, m = self.k, self.m
        scale = np.exp(sign * ((p[..., None, k : k + m] * self.centre).sum(-1) + self.held_centre))
        return np.concatenate([p[..., :k] * scale, p[..., k:]], axis=-1)

    def plain(self, index: int) -> Model:
        if index >= self.k:
            return self
        out = copy(self)
        out.z, out.centre, out.held_centre = self.z.copy(), self.centre.copy(), self.held_centre.copy()
        out.z[index] += self.centre[index][:, None]
        if self.held is not None:
            out.held = self.held.copy()
            out.held[index] += self.held_centre[index]
        out.centre[index] = out.held_centre[index] = 0.0
        return out

    def _phi(self, theta: Floats) -> Floats:
        exponent = np.tensordot(theta, self.z, axes=([1], [1]))
        if self.held is not None:
            exponent += self.held
        return np.exp(np.negative(exponent, out=exponent), out=exponent)

    def evaluate(self, vectors: Floats) -> Evaluation:
        c, theta = vectors[:, : self.k], vectors[:, self.k :]
        phi = self._phi(theta)  # (B, k, n)
        y = np.matmul(c[:, None, :], phi)[:, 0]
        jacobian = np.empty((len(vectors), self.k + self.m, phi.shape[2]))
        jacobian[:, : self.k] = phi
        share = np.multiply(c[:, :, None], phi)
        for j in range(self.m):
            jacobian[:, self.k + j] = -np.einsum("bkn,kn->bn", share, self.z[:, j])
        return Evaluation(y, jacobian, phi)

    def curvature(self, vectors: Floats, at: Evaluation, weight: Floats) -> Floats | None:
        c, k_all, m = vectors[:, : self.k], self.k, self.m
        h = np.zeros((len(vectors), k_all + m, k_all + m))
        for k in range(k_all):
            if not self.z[k].any():
                continue
            zk, moved = self.z[k], weight * at.memo[:, k]
            cross = -moved @ zk.T
            h[:, k, k_all:] += cross
            h[:, k_all:, k] += cross
            for i in range(m):
                if zk[i].any():
                    h[:, k_all + i, k_all:] += c[:, k, None] * ((moved * zk[i]) @ zk.T)
        return h


class OuterModel(SurfaceModel):
    """ŷ = constants + s^γ, s the sum of the terms that are none."""

    def __init__(self, law: SurfaceLaw, columns: Columns, centre: bool) -> None:
        super().__init__(law, columns, centre)
        self.inside = np.array([bool(t.powers) for t in law.terms])

    def evaluate(self, vectors: Floats) -> Evaluation:
        gamma = vectors[:, -1:, None]
        sums = super().evaluate(vectors[:, :-1])
        floor = vectors[:, : self.k][:, ~self.inside].sum(1)[:, None]
        inside = np.einsum("bk,bkn->bn", vectors[:, : self.k][:, self.inside], sums.memo[:, self.inside])
        s = np.maximum(inside, 1e-100)  # not y − floor: far below the floor nothing would be left of it
        risen = s ** gamma[:, :, 0]
        jacobian = np.concatenate([sums.jacobian, (risen * np.log(s))[:, None]], axis=1)
        chain = gamma * (risen / s)[:, None]
        jacobian[:, : self.k][:, self.inside] *= chain
        jacobian[:, self.k : -1] *= chain
        return Evaluation(floor + risen, jacobian)

    @property
    def eliminated(self) -> np.ndarray:
        return np.flatnonzero(self.inside)

    def curvature(self, vectors: Floats, at: Evaluation, weight: Floats) -> None:
        return None

    def search(self, count: int, loss: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """With the floor and γ given, (L − floor)^(1/γ) is linear in the other coefficients."""
        floors = np.flatnonzero(~self.inside)
        shares = [Parameter("floor", 0, 1, start=(0.0, 0.9))] if len(floors) else []
        table = spread((*shares, *self.domain[self.k :]), 4 * count)
        vectors = np.zeros((len(table), len(self.domain)))
        vectors[:, self.k :] = table[:, len(shares) :]
        if len(floors):
            vectors[:, floors[0]] = table[:, 0] * loss.min()
        rest = loss - vectors[:, : self.k].sum(1)[:, None]
        gamma = vectors[:, -1:]
        target = rest ** (1 / gamma)
        basis = self._phi(vectors[:, self.k : -1])[:, self.inside]
        return vectors, basis, target, (gamma * rest / target / loss) ** 2


def log_variables(n: ArrayLike, d: ArrayLike, c: ArrayLike | None = None) -> Floats:
    """ln N, ln D, ln C on a new last axis; C = 6ND when not given."""
    n, d = np.asarray(n, float), np.asarray(d, float)
    flops = 6.0 * n * d if c is None else np.asarray(c, float)
    return np.log(np.stack(np.broadcast_arrays(n, d, flops), axis=-1))


def compute_optimal(parameters: Mapping[str, float], budget_flops: float) -> tuple[float, float]:
    """N*, D* that minimise E + A/N^α + B/D^β subject to 6ND = C (Hoffmann et al. 2022, arXiv 2203.15556, eq. 4).

    N* = G·(C/6)^(β/(α+β)), D* = (1/G)·(C/6)^(α/(α+β)), G = (αA/(βB))^(1/(α+β)).

    Raises:
        InputError: a law without both terms (A or B is 0) has no optimum.
    """
    a, b, alpha, beta = (parameters[k] for k in ("A", "B", "alpha", "beta"))
    if a <= 0 or b <= 0:
        raise InputError(
            f"the fitted law has A = {a:.4g}, B = {b:.4g}: one term is missing, so no N minimises the loss; "
            "the runs need sizes on both sides of the optimum at some budget"
        )
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    x = budget_flops / 6.0
    return g * x ** (beta / (alpha + beta)), x ** (alpha / (alpha + beta)) / g
