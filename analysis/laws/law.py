"""What a law is to a solver and to a user: named parameters with their domains, a prediction, its derivatives.

A `Law` is a value. `law.bind(columns)` puts it beside n rows of data as a `Model`, which evaluates many parameter
vectors at once in coordinates in which they are well conditioned. To add a law, add one value to a table of laws:
a SurfaceLaw (analysis.laws.power) where it is a sum of powers, else a FormulaLaw with its derivatives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scaling.errors import InputError, unknown

Floats = NDArray[np.float64]
Columns = Mapping[str, Floats]

VARIABLES = {
    "n_params": "parameters N",
    "n_tokens": "training tokens D",
    "flops": "training FLOPs C (6·N·D where not given)",
    "unique_tokens": "different tokens U among the D (D where not given)",
    "width": "model width",
    "depth": "number of layers",
    "active_params": "parameters that a token meets (N where not given)",
    "experts": "number of experts (1 where not given)",
    "granularity": "how many fine-grained experts one dense MLP is cut into (1 where not given)",
    "weight_bits": "bits of a weight in training (16 where not given)",
}
"""Variables of loss surfaces, in natural units."""


def complete(columns: Mapping[str, ArrayLike]) -> dict[str, Floats]:
    """The columns as float arrays of one shape, with the defaults of VARIABLES filled in."""
    given = {name: np.asarray(value, float) for name, value in columns.items()}
    if "n_params" in given and "n_tokens" in given:
        given.setdefault("flops", 6.0 * given["n_params"] * given["n_tokens"])
        given.setdefault("unique_tokens", given["n_tokens"])
        given.setdefault("active_params", given["n_params"])
        for name, value in (("experts", 1.0), ("granularity", 1.0), ("weight_bits", 16.0)):
            given.setdefault(name, np.array(value))
    return dict(zip(given, np.broadcast_arrays(*given.values()), strict=True)) if given else {}


@dataclass(frozen=True)
class Parameter:
    """A free parameter of a law."""

    name: str
    low: float = 0.0
    high: float = np.inf
    """Its domain."""
    linear: bool = False
    """Whether the prediction is linear in it, the others given, so that a solver can eliminate it."""
    start: tuple[float, float] = (0.04, 1.6)
    """Range of the starts of one that is not linear: geometric where both ends are positive, else even."""


@dataclass(frozen=True)
class Evaluation:
    """Predictions of B parameter vectors at n rows."""

    y: Floats
    """(B, n)"""
    jacobian: Floats
    """(B, p, n): ∂y/∂parameter."""
    memo: Any = None
    """What the model keeps for `curvature`."""


class Model(ABC):
    """A law beside n rows of data. Vectors are in the model's own coordinates, in the order of law.domain."""

    domain: tuple[Parameter, ...]
    starts: int = 8
    """How many points of its search a fit descends from: more where there are more minima."""

    @property
    def eliminated(self) -> np.ndarray:
        """Indices of the parameters that `search` leaves to be found linearly."""
        return np.flatnonzero([q.linear for q in self.domain])

    @abstractmethod
    def evaluate(self, vectors: Floats) -> Evaluation:
        """Predictions and gradients of (B, p) vectors."""

    def curvature(self, vectors: Floats, at: Evaluation, weight: Floats) -> Floats | None:
        """Σ_n weight[b, n]·∂²y/∂p² for each vector, (B, p, p); None where the law gives none (Gauss–Newton then)."""
        return None

    def inward(self, values: Floats) -> Floats:
        """The law's parameters (…, p) in the model's coordinates."""
        return values

    def outward(self, vectors: Floats) -> Floats:
        """The model's coordinates (…, p) as the law's parameters."""
        return vectors

    def plain(self, index: int) -> Model:
        """The model in coordinates of which the one at `index` is the law's own parameter, so that it can be held."""
        return self

    def search(self, count: int, loss: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """Where a fit may start: about `count` vectors whose linear part is still to be found.

        Returns:
            vectors (S, p) with the `eliminated` parameters 0; basis (S, k, n), what each of them multiplies; target (S, n), what the
            linear part must make up, and its weight (S, n), so that Σ weight·(Σ_k c_k·basis_k − target)² is the squared
            relative error of the prediction to first order.
        """
        vectors = spread(self.domain, count)
        at = self.evaluate(vectors)
        basis = at.jacobian[:, self.eliminated]
        return vectors, basis, loss - at.y, np.broadcast_to(1 / loss**2, at.y.shape)


class Law(ABC):
    """A formula with free parameters."""

    name: str
    formula: str
    source: str
    on_frontier: bool = False
    """Whether it describes compute-optimal runs only, so that it is fitted on the lower envelope of loss against C."""
    fixed: tuple[tuple[str, str | float], ...] = ()
    """Parameters of the form it is a special case of: a value, or the name of the parameter they equal."""
    nested: tuple[str, tuple[tuple[str, float], ...]] | None = None
    """A law that it contains, and the values that reduce it to that one: the contained law's fit is one of its starts."""
    log_residual: ClassVar[bool] = True
    """Residuals are ln(predicted / actual); False: predicted − actual, for what may be 0 (accuracies)."""

    @property
    @abstractmethod
    def domain(self) -> tuple[Parameter, ...]:
        """The free parameters."""

    @property
    @abstractmethod
    def variables(self) -> tuple[str, ...]:
        """Columns that its data need."""

    @abstractmethod
    def bind(self, columns: Columns, centre: bool = True) -> Model:
        """The law at n rows of data; without `centre` the model's coordinates are the law's parameters."""

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the parameters that a fit finds."""
        return tuple(q.name for q in self.domain)

    def parameters(self, values: ArrayLike) -> dict[str, float]:
        """Name the free values and add the fixed ones (E = 0, β = α), so that nested laws read alike."""
        named = dict(zip(self.free, (float(v) for v in np.asarray(values)), strict=True))
        for name, value in self.fixed:
            named[name] = named[value] if isinstance(value, str) else value
        order = {"E": 0, "A": 1, "B": 2, "alpha": 3, "beta": 4}
        return dict(sorted(named.items(), key=lambda item: order.get(item[0], 9)))

    def values(self, parameters: Mapping[str, float]) -> Floats:
        """The free values out of named ones."""
        return np.array([parameters[name] for name in self.free], float)

    def predict(
        self,
        parameters: Mapping[str, float],
        n: ArrayLike | None = None,
        d: ArrayLike | None = None,
        c: ArrayLike | None = None,
        **columns: ArrayLike,
    ) -> Floats:
        """The prediction at N = n, D = d, C = c (6nd when None) and other columns by name; the arrays broadcast."""
        value, _ = self.value_and_gradient(parameters, n, d, c, **columns)
        return value

    def value_and_gradient(
        self,
        parameters: Mapping[str, float],
        n: ArrayLike | None = None,
        d: ArrayLike | None = None,
        c: ArrayLike | None = None,
        **columns: ArrayLike,
    ) -> tuple[Floats, Floats]:
        """The prediction and its gradient with respect to the free parameters (last axis, in the order of `free`)."""
        given: dict[str, ArrayLike] = dict(columns)
        given.update({k: v for k, v in (("n_params", n), ("n_tokens", d), ("flops", c)) if v is not None})
        full = complete(given)
        self.check_columns(full)
        shape = next(iter(full.values())).shape
        y, jacobian = self.rows(self.values(parameters)[None], {k: v.ravel() for k, v in full.items()})
        return y[0].reshape(shape), np.moveaxis(jacobian[0], 0, -1).reshape(*shape, len(self.free))

    def rows(self, values: Floats, columns: Columns) -> tuple[Floats, Floats]:
        """Predictions (B, n) of B parameter vectors, in the law's parameters, and their gradients (B, p, n)."""
        at = self.bind(columns, centre=False).evaluate(values)
        return at.y, at.jacobian

    def restrict(self, name: str | None = None, **fixed: str | float) -> Law:
        """The law with parameters held at a value, or equal to another parameter (given by its name).

        Raises:
            InputError: no such parameter; lists them.
        """
        for key, value in fixed.items():
            for parameter in (key, value):
                if isinstance(parameter, str) and parameter not in self.free:
                    raise unknown(f"parameter of the law {self.name!r}", parameter, self.free)
        return self._restrict(name or self.name, fixed)

    def _restrict(self, name: str, fixed: Mapping[str, str | float]) -> Law:
        return RestrictedLaw(self, name, (*self.fixed, *fixed.items()))

    def check_columns(self, columns: Mapping[str, Any]) -> None:
        """Refuse data that lack a variable of the law.

        Raises:
            InputError: names the missing columns and what they hold.
        """
        missing = [v for v in self.variables if v not in columns]
        if missing:
            means = "; ".join(f"{v}: {VARIABLES.get(v, v)}" for v in missing)
            raise InputError(f"the law {self.name!r} needs {', '.join(missing)} for every run ({means})")


def spread(domain: tuple[Parameter, ...], count: int) -> Floats:
    """About `count` vectors over the starts of the parameters that are not linear (those 0): a grid up to two, else Halton's
    sequence (Halton 1960)."""
    inner = [i for i, q in enumerate(domain) if not q.linear]
    out = np.zeros((1, len(domain)))
    if not inner:
        return out
    if len(inner) <= 2:
        side = max(2, round(count ** (1 / len(inner))))
        unit = np.stack(np.meshgrid(*[np.linspace(0, 1, side)] * len(inner)), axis=-1).reshape(-1, len(inner))
    else:
        unit = np.stack([_halton(count, base) for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)[: len(inner)]], axis=1)
    out = np.zeros((len(unit), len(domain)))
    for i, u in zip(inner, unit.T, strict=True):
        low, high = domain[i].start
        out[:, i] = low * (high / low) ** u if low > 0 else low + (high - low) * u
    return out


def _halton(count: int, base: int) -> Floats:
    index, out, factor = np.arange(1, count + 1), np.zeros(count), 1.0
    while index.any():
        factor /= base
        out += factor * (index % base)
        index = index // base
    return out


@dataclass(frozen=True)
class FormulaLaw(Law):
    """A law given by a function that returns predictions and gradients."""

    name: str
    formula: str
    source: str
    parameter_domain: tuple[Parameter, ...]
    needs: tuple[str, ...]
    """Its variables."""
    function: Callable[[Floats, Columns], tuple[Floats, Floats]]
    """(B, p) parameters and columns of n rows → predictions (B, n) and gradients (B, p, n)."""
    nested: tuple[str, tuple[tuple[str, float], ...]] | None = None
    on_frontier: bool = False

    @property
    def domain(self) -> tuple[Parameter, ...]:
        """The free parameters."""
        return self.parameter_domain

    @property
    def variables(self) -> tuple[str, ...]:
        """Columns that its data need."""
        return self.needs

    def bind(self, columns: Columns, centre: bool = True) -> Model:
        """The law at n rows of data, in its own parameters."""
        return _FormulaModel(self.parameter_domain, self.function, columns)


class _FormulaModel(Model):
    starts = 32

    def __init__(
        self,
        domain: tuple[Parameter, ...],
        function: Callable[[Floats, Columns], tuple[Floats, Floats]],
        columns: Columns,
    ) -> None:
        self.domain, self.function, self.columns = domain, function, columns

    def evaluate(self, vectors: Floats) -> Evaluation:
        y, jacobian = self.function(vectors, self.columns)
        return Evaluation(y, jacobian)

    def search(self, count: int, loss: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """Four times as dense: kinks and breaks make narrow valleys."""
        return super().search(4 * count, loss)


@dataclass(frozen=True)
class RestrictedLaw(Law):
    """A law with some parameters held at a value or shared."""

    base: Law
    name: str
    fixed: tuple[tuple[str, str | float], ...]

    @property
    def formula(self) -> str:  # type: ignore[override]
        """The base law's, with what is held."""
        return f"{self.base.formula}, {', '.join(f'{k} = {v}' for k, v in self.fixed)}"

    @property
    def source(self) -> str:  # type: ignore[override]
        """The base law's."""
        return self.base.source

    @property
    def on_frontier(self) -> bool:  # type: ignore[override]
        """The base law's."""
        return self.base.on_frontier

    @property
    def domain(self) -> tuple[Parameter, ...]:
        """What is left free; one that others share is not linear for a solver unless they all are."""
        held = dict(self.fixed)
        shared = {v for v in held.values() if isinstance(v, str)}
        return tuple(
            replace(q, linear=q.linear and q.name not in shared) for q in self.base.domain if q.name not in held
        )

    @property
    def variables(self) -> tuple[str, ...]:
        """The base law's."""
        return self.base.variables

    def bind(self, columns: Columns, centre: bool = True) -> Model:
        """The base law's model, uncentred, over the free parameters."""
        return _RestrictedModel(self, self.base.bind(columns, centre=False))


class _RestrictedModel(Model):
    """values of the base = offset + map · free values."""

    def __init__(self, law: RestrictedLaw, base: Model) -> None:
        self.domain, self.base, self.starts = law.domain, base, base.starts
        names, free, held = law.base.free, law.free, dict(law.fixed)
        self.offset, self.map = np.zeros(len(names)), np.zeros((len(names), len(free)))
        for i, name in enumerate(names):
            target = held.get(name, name)
            if isinstance(target, str):
                self.map[i, free.index(target)] = 1.0
            else:
                self.offset[i] = target

    def evaluate(self, vectors: Floats) -> Evaluation:
        at = self.base.evaluate(vectors @ self.map.T + self.offset)
        return Evaluation(at.y, np.einsum("pq,bpn->bqn", self.map, at.jacobian), at)

    def curvature(self, vectors: Floats, at: Evaluation, weight: Floats) -> Floats | None:
        inner = self.base.curvature(vectors @ self.map.T + self.offset, at.memo, weight)
        return None if inner is None else np.einsum("pq,bpr,rs->bqs", self.map, inner, self.map)
