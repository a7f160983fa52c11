"""Laws that are a sum of power terms, L = Σ_k c_k · Π_v v^(−exponent): loss surfaces in N and D, frontiers in C.

The coefficients c_k are non-negative and enter linearly, so that a solver can eliminate them (variable projection).
To add a law of this kind, add one value to LAWS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scaling.errors import InputError, unknown

Variable = Literal["n_params", "n_tokens", "flops"]
VARIABLES: tuple[Variable, ...] = ("n_params", "n_tokens", "flops")
Floats = NDArray[np.float64]

EXPONENT_RANGE = (0.01, 3.0)
"""Domain of every exponent; below it a power term is indistinguishable from the constant."""


@dataclass(frozen=True)
class Term:
    """coefficient · Π variable^(−exponent), the exponents by name; no powers: a constant."""

    coefficient: str
    powers: tuple[tuple[Variable, str], ...] = ()


@dataclass(frozen=True)
class SurfaceLaw:
    """A sum of power terms. Parameters: the coefficients (≥ 0), then the exponents (in EXPONENT_RANGE)."""

    name: str
    formula: str
    source: str
    terms: tuple[Term, ...]
    on_frontier: bool = False
    """Whether it describes compute-optimal runs only, so that it is fitted on the lower envelope of loss against C."""
    fixed: tuple[tuple[str, str | float], ...] = ()
    """Parameters of the form it is a special case of: a value, or the name of the parameter they equal."""

    @property
    def coefficients(self) -> tuple[str, ...]:
        """Names of the linear parameters, in the terms' order."""
        return tuple(t.coefficient for t in self.terms)

    @property
    def exponents(self) -> tuple[str, ...]:
        """Names of the exponents, in order of first use."""
        return tuple(dict.fromkeys(name for t in self.terms for _, name in t.powers))

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the parameters that a fit finds: coefficients, then exponents."""
        return self.coefficients + self.exponents

    def parameters(self, values: ArrayLike) -> dict[str, float]:
        """Name the free values and add the fixed ones (E = 0, β = α), so that nested laws read alike."""
        named = dict(zip(self.free, (float(v) for v in np.asarray(values)), strict=True))
        for name, value in self.fixed:
            named[name] = named[value] if isinstance(value, str) else value
        order = {"E": 0, "A": 1, "B": 2, "alpha": 3, "beta": 4}
        return dict(sorted(named.items(), key=lambda item: order.get(item[0], 9)))

    def design(self) -> Floats:
        """Which exponent acts on which variable in which term: (terms, exponents, variables), ones and zeros."""
        out = np.zeros((len(self.terms), len(self.exponents), len(VARIABLES)))
        for k, term in enumerate(self.terms):
            for variable, name in term.powers:
                out[k, self.exponents.index(name), VARIABLES.index(variable)] += 1.0
        return out

    def _terms(self, values: Floats, x: Floats) -> tuple[Floats, Floats]:
        z = np.einsum("kmv,...v->k...m", self.design(), x)
        k = len(self.terms)
        phi = np.exp(-np.tensordot(z, values[..., k:], axes=([-1], [-1])))
        return np.moveaxis(phi, 0, -1), np.moveaxis(z, 0, -2)

    def predict(
        self, parameters: Mapping[str, float], n: ArrayLike, d: ArrayLike, c: ArrayLike | None = None
    ) -> Floats:
        """Loss at N = n, D = d, C = c (6nd when None); the arrays broadcast. `parameters` by name."""
        value, _ = self.value_and_gradient(parameters, n, d, c)
        return value

    def value_and_gradient(
        self, parameters: Mapping[str, float], n: ArrayLike, d: ArrayLike, c: ArrayLike | None = None
    ) -> tuple[Floats, Floats]:
        """Loss and its gradient with respect to the free parameters (last axis, in the order of `free`).

        ∂L/∂c_k = φ_k and ∂L/∂θ_j = −Σ_k c_k φ_k z_kj with φ_k = exp(−Σ_j θ_j z_kj), z_kj the log variables of term k.
        """
        theta = np.array([parameters[name] for name in self.free])
        phi, z = self._terms(theta, log_variables(n, d, c))
        weighted = phi * theta[: len(self.terms)]
        gradient = np.concatenate([phi, -np.einsum("...k,...km->...m", weighted, z)], axis=-1)
        return weighted.sum(-1), gradient


def log_variables(n: ArrayLike, d: ArrayLike, c: ArrayLike | None = None) -> Floats:
    """ln N, ln D, ln C on a new last axis, in the order of VARIABLES; C = 6ND when not given."""
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


_E, _N, _D = Term("E"), Term("A", (("n_params", "alpha"),)), Term("B", (("n_tokens", "beta"),))
_TIED = Term("B", (("n_tokens", "alpha"),))

LAWS: dict[str, SurfaceLaw] = {
    law.name: law
    for law in (
        SurfaceLaw(
            "chinchilla",
            "L = E + A/N^α + B/D^β",
            "Hoffmann et al. 2022, arXiv 2203.15556",
            (_E, _N, _D),
        ),
        SurfaceLaw(
            "tied",
            "L = E + A/N^α + B/D^α",
            "Gadre et al. 2024, arXiv 2403.08540",
            (_E, _N, _TIED),
            fixed=(("beta", "alpha"),),
        ),
        SurfaceLaw(
            "chinchilla_no_floor",
            "L = A/N^α + B/D^β",
            "the Chinchilla form with E = 0: far above the floor, loss is a sum of pure powers",
            (_N, _D),
            fixed=(("E", 0.0),),
        ),
        SurfaceLaw(
            "tied_no_floor",
            "L = A/N^α + B/D^α",
            "the tied form with E = 0: the frontier is a pure power of compute",
            (_N, _TIED),
            fixed=(("E", 0.0), ("beta", "alpha")),
        ),
        SurfaceLaw(
            "frontier",
            "L = L∞ + a·C^−s on compute-optimal runs",
            "Kaplan et al. 2020, arXiv 2001.08361; with a floor, Hoffmann et al. 2022",
            (Term("L_inf"), Term("a", (("flops", "s"),))),
            on_frontier=True,
        ),
        SurfaceLaw(
            "frontier_no_floor",
            "L = a·C^−s on compute-optimal runs",
            "Kaplan et al. 2020, arXiv 2001.08361",
            (Term("a", (("flops", "s"),)),),
            on_frontier=True,
            fixed=(("L_inf", 0.0),),
        ),
    )
}
"""Every law by name."""


def get_law(name: str) -> SurfaceLaw:
    """The law of that name.

    Raises:
        InputError: no such law; lists all.
    """
    if name not in LAWS:
        raise unknown("law", name, LAWS)
    return LAWS[name]
