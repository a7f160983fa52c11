"""Hold out the largest runs, fit the rest, and say how far the forecast of each was off."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.inference.backtest import LARGE_SWEEP, SMALL_SWEEP, Member, fit_members
from analysis.inference.fitting import FitResult, fit_law
from analysis.inference.points import compute_levels, points
from analysis.inference.solver import HUBER, Robust, log_predictions
from analysis.laws.law import Floats
from analysis.laws.surface import get_law
from analysis.runs import Runs
from scaling.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

_CHUNK = 2_000
"""Held-out runs whose intervals are computed at once."""


@dataclasses.dataclass(frozen=True)
class HoldOut:
    """What a fit of the smaller runs said about the larger ones."""

    cut_flops: float
    """Runs above this were held out."""
    fit: FitResult
    rows: tuple[dict[str, Any], ...]
    """A held-out run each: run_id, flops, n_params, n_tokens, loss, predicted, relative_error, inside_50, inside_90."""
    by_law: dict[str, float]
    """Root mean square relative error of what predicts ("ensemble", or the law asked for) and of every law that the
    smaller runs can be fitted with, plainly."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {
            "cut_flops": self.cut_flops,
            "law": self.fit.law,
            "rms_error_by_law": self.by_law,
            "runs": list(self.rows),
        }


def hold_out(
    runs: Runs, cut_flops: float | None = None, law: str = "auto", draws: int = 1000, robust: Robust = HUBER
) -> HoldOut:
    """Fit the runs of at most `cut_flops` (None: all but the top compute level) and predict the others.

    Raises:
        InputError: the cut leaves nothing above it, or too few runs below.
    """
    data = points(runs)
    if cut_flops is None:
        level = compute_levels(data)
        if level.max() == 0:
            raise InputError("all runs have one compute level: there is no top level to hold out")
        cut_flops = float(np.exp(data.log_flops[level < level.max()].max()))
    flops = runs.table["flops"].to_numpy(float)
    above = flops > cut_flops * (1 + 1e-9)
    if not above.any() or above.all():
        raise InputError(
            f"--hold-out {cut_flops:g}: it must leave runs on both sides; the runs spend {flops.min():.3g} to "
            f"{flops.max():.3g} FLOPs"
        )
    below = _take(runs, ~above)
    fit = fit_law(below, law, draws=draws, robust=robust)
    held = _take(runs, above).table
    smaller, larger, loss = data.take(~above), data.take(above), held["loss"].to_numpy(float)
    members = [
        Member(name, robust=robust)
        for name in dict.fromkeys((*LARGE_SWEEP, *SMALL_SWEEP))
        if name != law and len(get_law(name).free) <= smaller.n_cells
    ]
    by_law = {"ensemble" if law == "auto" else law: _rms(fit.predict(held["n_params"], held["n_tokens"]), loss)}
    for member, values in fit_members(members, smaller).items():
        by_law[member.law] = _rms(np.exp(log_predictions(member.form, values[None], larger.columns)[0]), loss)
    return HoldOut(cut_flops, fit, tuple(_rows(fit, held)), by_law)


def _rms(predicted: Floats, loss: Floats) -> float:
    return float(np.sqrt(((predicted / loss - 1) ** 2).mean()))


def _take(runs: Runs, mask: np.ndarray) -> Runs:
    return dataclasses.replace(runs, table=runs.table[mask].reset_index(drop=True))


def _rows(fit: FitResult, held: pd.DataFrame) -> list[dict[str, Any]]:
    rows = []
    for start in range(0, len(held), _CHUNK):
        part = held.iloc[start : start + _CHUNK]
        n, d, loss = (part[name].to_numpy(float) for name in ("n_params", "n_tokens", "loss"))
        predicted = fit.predict(n, d)
        ends = [fit.predict_interval(n, d, level) for level in (0.5, 0.9)]
        inside_50, inside_90 = ((low <= loss) & (loss <= high) for low, high in ends)
        columns = {
            "run_id": part["run_id"].tolist(),
            "flops": part["flops"].astype(float).tolist(),
            "n_params": n.tolist(),
            "n_tokens": d.tolist(),
            "loss": loss.tolist(),
            "predicted": predicted.tolist(),
            "relative_error": (predicted / loss - 1).tolist(),
            "inside_50": inside_50.tolist(),
            "inside_90": inside_90.tolist(),
        }
        rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return rows
