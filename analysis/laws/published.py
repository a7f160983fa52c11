"""Published fits by name, with their sources: what others measured, to print beside one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from analysis.laws.law import Law
from analysis.laws.power import compute_optimal
from analysis.laws.surface import get_law


@dataclass(frozen=True)
class PublishedLaw:
    """A published fit of the Chinchilla form. Losses of different data and tokenizers are not comparable; N* and D* are."""

    name: str
    parameters: Mapping[str, float]
    source: str

    @property
    def law(self) -> Law:
        """The form."""
        return get_law("chinchilla")

    def allocate(self, budget_flops: float) -> tuple[float, float, float]:
        """N*, D* and the loss there, for C = 6ND."""
        n, d = compute_optimal(self.parameters, budget_flops)
        return n, d, float(self.law.predict(self.parameters, n, d))


PUBLISHED: tuple[PublishedLaw, ...] = (
    PublishedLaw(
        "Hoffmann et al. 2022",
        {"E": 1.6934, "A": 406.4, "B": 410.7, "alpha": 0.3392, "beta": 0.2849},
        "arXiv 2203.15556, approach 3, unrounded as in the paper's TeX source",
    ),
    PublishedLaw(
        "Besiroglu et al. 2024",
        {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
        "arXiv 2404.10102, refit of the same runs",
    ),
    PublishedLaw(
        "Muennighoff et al. 2023",
        {"E": 1.869, "A": 521.0, "B": 1488.0, "alpha": 0.3527, "beta": 0.3527},
        "arXiv 2305.16264, unique data, α = β",
    ),
)
"""In order of publication of the runs."""
