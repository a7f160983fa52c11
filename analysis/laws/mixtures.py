"""Loss of a domain as a function of the proportions of the training mixture (Ye et al. 2024, arXiv 2403.16952, eq. 6).

    L_i(r) = c_i + k_i·exp(Σ_j t_ij·r_j),   Σ_j r_j = 1

Since the proportions sum to 1, adding a number to every t_ij and dividing k_i by its exponential changes nothing: k_i and
the level of the t_ij are one parameter. The law here has b_ij = t_ij + ln k_i; `exponents` gives the k and t of Σ_j t_ij = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.laws.law import Columns, Evaluation, Floats, Law, Model, Parameter


@dataclass(frozen=True)
class MixtureLaw(Law):
    """L(r) = c + exp(Σ_j b_j·r_j) for one evaluated domain. Parameters: c, then b_<domain> of each training domain."""

    training_domains: tuple[str, ...]
    name: str = "mixture"
    formula: str = "L = c + k·exp(Σ_j t_j·r_j), b_j = t_j + ln k"
    source: str = "Ye et al. 2024, arXiv 2403.16952, eq. 6"

    @property
    def domain(self) -> tuple[Parameter, ...]:
        """The floor, and one exponent for each training domain, of either sign."""
        exponents = [Parameter(f"b_{d}", -np.inf, linear=True) for d in self.training_domains]
        return (Parameter("c"), *exponents)

    @property
    def variables(self) -> tuple[str, ...]:
        """r_<domain> of each training domain."""
        return tuple(f"r_{d}" for d in self.training_domains)

    def bind(self, columns: Columns, centre: bool = True) -> Model:
        """The law at n mixtures."""
        return _MixtureModel(self.domain, np.stack([columns[v] for v in self.variables]))

    def exponents(self, parameters: Mapping[str, float]) -> tuple[float, Floats]:
        """k and the t_j of Ye et al., with Σ_j t_j = 0."""
        b = np.array([parameters[f"b_{d}"] for d in self.training_domains])
        return float(np.exp(b.mean())), b - b.mean()


class _MixtureModel(Model):
    def __init__(self, domain: tuple[Parameter, ...], proportions: Floats) -> None:
        self.domain, self.r = domain, proportions

    def evaluate(self, vectors: Floats) -> Evaluation:
        grown = np.exp(np.minimum(vectors[:, 1:] @ self.r, 50.0))
        jacobian = np.concatenate([np.ones_like(grown)[:, None], grown[:, None] * self.r], axis=1)
        return Evaluation(vectors[:, :1] + grown, jacobian, grown)

    def curvature(self, vectors: Floats, at: Evaluation, weight: Floats) -> Floats:
        h = np.zeros((len(vectors), len(self.domain), len(self.domain)))
        h[:, 1:, 1:] = np.matmul((weight * at.memo)[:, None] * self.r, self.r.T)
        return h

    def search(self, count: int, loss: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """With the floor given, ln(L − c) is linear in the exponents."""
        vectors = np.zeros((count, len(self.domain)))
        vectors[:, 0] = loss.min() * np.linspace(0.0, 0.99, count)
        rest = loss - vectors[:, :1]
        basis = np.broadcast_to(self.r, (count, *self.r.shape))
        return vectors, basis, np.log(rest), (rest / loss) ** 2
