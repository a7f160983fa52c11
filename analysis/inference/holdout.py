"""Hold out the largest runs, fit the rest, and say how far the forecast of each was off."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.inference.backtest import LARGE_SWEEP, SMALL_SWEEP
from analysis.inference.fitting import FitResult, fit_law
from analysis.inference.points import compute_levels, points
from analysis.laws.surface import get_law
from analysis.runs import Runs
from scaling.errors import InputError


@dataclasses.dataclass(frozen=True)
class HoldOut:
    """What a fit of the smaller runs said about the larger ones."""

    cut_flops: float
    """Runs above this were held out."""
    fit: FitResult
    rows: tuple[dict[str, Any], ...]
    """A held-out run each: run_id, flops, n_params, n_tokens, loss, predicted, relative_error, inside_50, inside_90."""
    by_law: dict[str, float]
    """Root mean square relative error of every law that the smaller runs can be fitted with."""


def hold_out(runs: Runs, cut_flops: float | None = None, law: str = "auto", draws: int = 1000) -> HoldOut:
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
    fit = fit_law(below, law, draws=draws)
    held = _take(runs, above).table
    by_law = {}
    laws = [n for n in dict.fromkeys((*LARGE_SWEEP, *SMALL_SWEEP)) if len(get_law(n).free) <= points(below).n_cells]
    for name in dict.fromkeys((law, *laws)):
        other = fit if name == law else fit_law(below, name, draws=2)
        error = other.predict(held["n_params"], held["n_tokens"]) / held["loss"].to_numpy(float) - 1
        by_law[name] = float(np.sqrt((error**2).mean()))
    return HoldOut(cut_flops, fit, tuple(_rows(fit, held.to_dict("records"))), by_law)


def _take(runs: Runs, mask: np.ndarray) -> Runs:
    return dataclasses.replace(runs, table=runs.table[mask].reset_index(drop=True))


def _rows(fit: FitResult, held: Sequence[dict[Any, Any]]) -> list[dict[str, Any]]:
    rows = []
    for run in held:
        n, d, loss = run["n_params"], run["n_tokens"], float(run["loss"])
        predicted = float(fit.predict(n, d))
        inside = {}
        for level in (0.5, 0.9):
            low, high = fit.predict_interval(n, d, level)
            inside[f"inside_{100 * level:.0f}"] = bool(low <= loss <= high)
        rows.append(
            {
                "run_id": run["run_id"],
                "flops": float(run["flops"]),
                "n_params": float(n),
                "n_tokens": float(d),
                "loss": loss,
                "predicted": predicted,
                "relative_error": predicted / loss - 1,
                **inside,
            }
        )
    return rows
