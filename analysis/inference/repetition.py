"""What repeated text is worth, from the runs of a sweep that repeat it; and the others, which laws of fresh tokens are fitted to."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from analysis.inference.fitting import FitResult
from analysis.inference.points import Points, points
from analysis.inference.solver import HUBER, Robust, solve
from analysis.inference.uncertainty import bootstrap
from analysis.laws.formulas import DATA_CONSTRAINED
from analysis.laws.law import Law
from analysis.laws.surface import get_law
from analysis.runs import Runs

R_TOKENS, R_PARAMS = 15.388, 5.310
"""Decay of the worth of repeated tokens and of parameters beyond the optimum of the unique ones: Muennighoff et al. 2023,
arXiv 2305.16264, where the runs do not tell."""
AS_FRESH = 1.5
"""Epochs up to which a run counts as one on fresh text: were R_D 7, its tokens would be worth 99% of fresh ones."""
_LEAST_RUNS = 4
_WIDEST = 5.0
"""Upper over lower end of R_D's interval, above which the runs do not tell it."""
_DRAWS = 300
_R_DOMAIN = next((q.low, q.high) for q in DATA_CONSTRAINED.domain if q.name == "R_D")


@dataclass(frozen=True)
class Repetition:
    """R_D of the data-constrained law."""

    r_tokens: float
    interval_95: tuple[float, float]
    n_runs: int
    """That repeat their text."""

    @property
    def identified(self) -> bool:
        """Whether the runs tell it: the interval is narrow, and not at an end of what R_D may be."""
        low, high = self.interval_95
        least, most = _R_DOMAIN
        return high <= _WIDEST * low and 1.01 * least < low and 1.01 * high < most


def repeats(data: Points) -> np.ndarray:
    """(n,) bool: the runs that read their text more than AS_FRESH times."""
    return np.asarray(data.columns["n_tokens"] > AS_FRESH * data.columns["unique_tokens"])


def measure_repetition(runs: Runs, robust: Robust = HUBER, seed: int = 0) -> Repetition | None:
    """R_D with its 95% bootstrap interval from all runs, R_N held at the published value, which small sweeps do not tell.

    None where fewer than four different runs repeat their text, or the runs are too few for the law.
    """
    data = points(runs)
    again = repeats(data)
    law = DATA_CONSTRAINED.restrict(None, R_N=R_PARAMS)
    if not again.any() or data.take(again).n_cells < _LEAST_RUNS or data.n_cells < len(law.free):
        return None
    best = solve(law, data.columns, data.loss, robust).values[0]
    column = law.free.index("R_D")
    draws = bootstrap(law, data, best, _DRAWS, seed, robust).values[:, column]
    low, high = np.quantile(draws, (0.025, 0.975))
    return Repetition(float(best[column]), (float(low), float(high)), int(again.sum()))


def repetition_of(fit: FitResult) -> Repetition | None:
    """R_D of a fit of the data-constrained law that identifies it; None of any other."""
    if "R_D" not in fit.parameters:
        return None
    found = Repetition(fit.parameters["R_D"], fit.intervals["R_D"], fit.n_runs)
    return found if found.identified else None


def fresh(runs: Runs) -> Runs:
    """Without the runs that repeat their text."""
    return dataclasses.replace(runs, table=runs.table[~repeats(points(runs))].reset_index(drop=True))


def split_repeats(runs: Runs, law: str = "auto", robust: Robust = HUBER) -> tuple[Runs, Repetition | None]:
    """The runs that a law of fresh tokens is fitted to, with a note on the others, and what those say of repeated text.

    A law that knows repetition keeps all, and so does one for which the others are too few.

    Returns:
        the runs, and R_D where the runs identify it.
    """
    again = repeats(points(runs))
    form = get_law("tied_no_floor" if law == "auto" else law)
    if not again.any() or "unique_tokens" in form.variables:
        return runs, None
    found = measure_repetition(runs, robust)
    told = found if found is not None and found.identified else None
    kept = fresh(runs)
    said = f"{int(again.sum())} of {len(runs)} runs read their text more than {AS_FRESH:g} times"
    if kept.table.empty or not _enough(form, points(kept)):
        note = f"{said}; the others are too few for a law, so that all count as fresh: --law data_constrained knows repetition"
        return dataclasses.replace(runs, notes=(*runs.notes, note)), told
    note = f"{said} and are left out of the law of fresh tokens; {_worth(found)}"
    return dataclasses.replace(kept, notes=(*runs.notes, note)), told


def _enough(law: Law, data: Points) -> bool:
    return data.n_cells >= len(law.free)


def _worth(found: Repetition | None) -> str:
    if found is None:
        return "they are too few to tell what repeated tokens are worth"
    low, high = found.interval_95
    interval = f"R_D {found.r_tokens:.2g} (95% {low:.2g} to {high:.2g})"
    if found.identified:
        return f"of repeated tokens they say {interval}"
    return f"they do not tell what repeated tokens are worth: {interval}"
