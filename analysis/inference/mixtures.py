"""Data mixtures: the law of every domain's loss from a few runs, and the mixture with the lowest weighted loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from analysis.inference.solver import HUBER, Robust, log_predictions, resolve, solve
from analysis.laws.law import Floats
from analysis.laws.mixtures import MixtureLaw
from scaling.errors import InputError, unknown

_SUM_TOLERANCE = 1e-3
_DRAWS = 200


@dataclass(frozen=True, eq=False)
class Mixtures:
    """n runs of one size and length that differ in their mixture."""

    proportions: Mapping[str, Floats]
    """By training domain, (n,) each: shares of the training tokens, summing to 1."""
    losses: Mapping[str, Floats]
    """By evaluated domain, (n,) each."""

    def __post_init__(self) -> None:
        r = np.stack([np.asarray(v, float) for v in self.proportions.values()])
        total = r.sum(0)
        if not np.isfinite(r).all() or (r < 0).any():
            raise InputError("proportions must be finite and not negative")
        wrong = np.flatnonzero(np.abs(total - 1) > _SUM_TOLERANCE)
        if len(wrong):
            raise InputError(
                f"the proportions of run {wrong[0]} sum to {total[wrong[0]]:.6g}: they are shares of the training tokens "
                "and must sum to 1; give every domain, in [0, 1] and not in percent"
            )
        m, n = r.shape
        if m < 2:
            raise InputError(f"{m} training domain: a mixture has two at least")
        distinct = np.unique((r / total).round(6), axis=1)
        directions = np.linalg.matrix_rank(distinct - distinct[:, :1], tol=1e-4)
        if directions < m - 1:
            raise InputError(
                f"{n} runs with {distinct.shape[1]} different mixtures of {m} domains vary in {directions} directions of "
                f"{m - 1}: what each domain does cannot be told; add runs that raise and lower every domain on its own"
            )
        if distinct.shape[1] < m + 1:
            raise InputError(
                f"{distinct.shape[1]} different mixtures for {m + 1} parameters of each domain's law: "
                f"{m + 1} are the least, {2 * m} a fair number"
            )
        for domain, loss in self.losses.items():
            if len(loss) != n or not (np.isfinite(loss).all() and (np.asarray(loss) > 0).all()):
                raise InputError(f"losses of {domain!r}: one positive loss for each of the {n} runs")

    @classmethod
    def from_table(cls, table: Mapping[str, ArrayLike]) -> Mixtures:
        """Out of columns r_<training domain> and loss_<evaluated domain>, as of a pandas table.

        Raises:
            InputError: neither is there, or the proportions are none.
        """
        parts = {
            prefix: {str(c)[len(prefix) :]: np.asarray(table[c], float) for c in table if str(c).startswith(prefix)}
            for prefix in ("r_", "loss_")
        }
        if not parts["r_"] or not parts["loss_"]:
            raise InputError(
                f"columns {', '.join(map(str, table))}: a mixture needs r_<domain> for every training domain and "
                "loss_<domain> for at least one evaluated domain"
            )
        return cls(parts["r_"], parts["loss_"])

    @property
    def columns(self) -> dict[str, Floats]:
        """r_<domain>, exactly on the simplex."""
        total = np.sum([np.asarray(v, float) for v in self.proportions.values()], axis=0)
        return {f"r_{d}": np.asarray(v, float) / total for d, v in self.proportions.items()}


@dataclass(frozen=True, eq=False)
class MixtureFit:
    """The law of every evaluated domain, with bootstrap draws over runs that all domains share."""

    law: MixtureLaw
    parameters: Mapping[str, dict[str, float]]
    """By evaluated domain."""
    draws: Mapping[str, Floats]
    """By evaluated domain: (R, p)."""
    residual_sd: Mapping[str, float]
    """By evaluated domain: standard deviation of ln loss about the law."""

    def predict(self, proportions: Mapping[str, ArrayLike]) -> dict[str, Floats]:
        """Loss of every evaluated domain at mixtures of the training domains."""
        columns = {f"r_{d}": np.asarray(proportions[d], float) for d in self.law.training_domains}
        return {name: self.law.predict(p, **columns) for name, p in self.parameters.items()}

    def total(self, proportions: Mapping[str, ArrayLike], weights: Mapping[str, float] | None = None) -> Floats:
        """Σ_i w_i·L_i(r); equal weights when None."""
        losses, w = self.predict(proportions), self._weights(weights)
        return np.sum([w[name] * losses[name] for name in w], axis=0)

    def _weights(self, weights: Mapping[str, float] | None) -> dict[str, float]:
        given = dict(weights or dict.fromkeys(self.parameters, 1.0))
        for name, value in given.items():
            if name not in self.parameters:
                raise unknown("evaluated domain", name, self.parameters)
            if value < 0:
                raise InputError(f"weight {value} of {name!r}: must not be negative")
        scale = sum(given.values())
        if scale <= 0:
            raise InputError("the weights of the evaluated domains are all 0: at least one must be positive")
        return {name: value / scale for name, value in given.items()}

    def optimum(
        self, weights: Mapping[str, float] | None = None, at_most: Mapping[str, float] | None = None
    ) -> OptimalMixture:
        """The mixture of the lowest Σ_i w_i·L_i(r), convex in r, and where its bootstrap draws lie.

        Args:
            weights: of the evaluated domains; equal when None.
            at_most: greatest share of a training domain, as when its tokens run out.

        Raises:
            InputError: an unknown domain, a negative weight, or shares that cannot sum to 1.
        """
        w, names = self._weights(weights), self.law.training_domains
        for name in at_most or {}:
            if name not in names:
                raise unknown("training domain", name, names)
        high = np.array([(at_most or {}).get(name, 1.0) for name in names])
        if (high < 0).any() or np.minimum(high, 1).sum() < 1:
            raise InputError(f"at_most leaves shares up to {np.minimum(high, 1).sum():.4g} in all: they must reach 1")
        scale = np.array(list(w.values()))
        b = np.stack([self.law.values(self.parameters[name])[1:] for name in w])
        best = _minimise(scale, b, high)
        many = np.stack(
            [
                _minimise(scale, np.stack([self.draws[name][k, 1:] for name in w]), high, best)
                for k in range(self.n_draws)
            ]
        )
        low, top = np.quantile(many, [0.025, 0.975], axis=0)
        shares = dict(zip(names, best.tolist(), strict=True))
        return OptimalMixture(
            shares,
            dict(zip(names, zip(low.tolist(), top.tolist(), strict=True), strict=True)),
            float(self.total(shares, w)),
        )

    @property
    def n_draws(self) -> int:
        """Bootstrap draws."""
        return len(next(iter(self.draws.values())))


@dataclass(frozen=True)
class OptimalMixture:
    """Where the weighted loss is least."""

    proportions: dict[str, float]
    interval_95: dict[str, tuple[float, float]]
    loss: float
    """Weighted mean over the evaluated domains."""


def fit_mixtures(runs: Mixtures, robust: Robust = HUBER, draws: int = _DRAWS, seed: int = 0) -> MixtureFit:
    """Fit c_i + k_i·exp(Σ_j t_ij·r_j) for every evaluated domain; one Bayesian bootstrap over runs for all of them."""
    law = MixtureLaw(tuple(runs.proportions))
    columns = runs.columns
    n = len(next(iter(columns.values())))
    weights = n * np.random.default_rng(seed).dirichlet(np.ones(n), size=draws)
    parameters, many, noise = {}, {}, {}
    for name, values in runs.losses.items():
        loss = np.asarray(values, float)
        best = solve(law, columns, loss, robust).values
        parameters[name] = law.parameters(best[0])
        many[name] = resolve(law, columns, loss, best[0], weights, robust).values
        residual = np.log(loss) - log_predictions(law, best, columns)[0]
        noise[name] = float(np.sqrt(residual @ residual / max(n - len(law.free), 1)))
    return MixtureFit(law, parameters, many, noise)


def _minimise(weights: Floats, b: Floats, high: Floats, start: Floats | None = None) -> Floats:
    """argmin_r Σ_i w_i·exp(b_i·r) on the simplex with r ≤ high."""
    from scipy.optimize import Bounds, LinearConstraint, minimize

    m = b.shape[1]
    scale = weights * np.exp(b.mean(1))
    t = b - b.mean(1, keepdims=True)
    unit = scale.sum()

    def value(r: Floats) -> tuple[float, Floats]:
        grown = scale * np.exp(t @ r) / unit
        return float(grown.sum()), grown @ t

    first = np.minimum(np.full(m, 1 / m), high) if start is None else start
    found = minimize(
        value, first, jac=True, method="SLSQP", bounds=Bounds(0.0, np.minimum(high, 1.0)),
        constraints=LinearConstraint(np.ones(m), 1.0, 1.0), options={"ftol": 1e-13, "maxiter": 300},
    )  # fmt: skip
    r = np.clip(found.x, 0.0, np.minimum(high, 1.0))
    return np.asarray(r / r.sum(), float)
