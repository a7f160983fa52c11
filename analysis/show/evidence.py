"""The part of a report that says why to believe it: approaches, backtest, remarks, and every run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.laws import PUBLISHED
from analysis.show import html, numbers
from analysis.show.backtest import law_backtest

if TYPE_CHECKING:
    from analysis.inference import FitResult
    from analysis.runs import Runs

APPROACHES = {"1": "1, lower envelope", "2": "2, IsoFLOP parabolas", "3": "3, fitted surface"}
BACKTEST: dict[str, tuple[str, Callable[[Any], object]]] = {
    "law": ("law", str),
    "fitted up to (FLOPs)": ("cut_flops", numbers.flops),
    "runs": ("n_fitted", int),
    "held out": ("n_held_out", int),
    "up to": ("ratio", lambda ratio: f"{ratio:.1f}×"),
    "mean error": ("mean_error", lambda error: numbers.percent(-error)),
    "rms error": ("rms_error", lambda error: f"{error:.2%}"),
    "inside 50%": ("coverage_50", numbers.share),
    "inside 90%": ("coverage_90", numbers.share),
}
"""Column → key of a backtest row and how it is written; its errors are ln(actual / predicted), shown as forecast over actual."""


def evidence(fit: FitResult, runs: Runs, target: float, remarks: Sequence[str]) -> list[str]:
    """The approaches and the published laws at `target` FLOPs, the backtest, remarks, and every run.

    Args:
        remarks: what to look out for; the runs' own notes are added.
    """
    blocks = []
    at = f"at {numbers.flops(target)} FLOPs"
    header = ["approach", "N* ∝ C^a, a", "D* ∝ C^b, b", f"N* {at}", f"D* {at}"]
    rows = [[APPROACHES[name], *_approach(value, target)] for name, value in fit.approaches.items()]
    blocks += ["<h2>Chinchilla's three approaches</h2>", html.table("", header, rows)]
    blocks += [f'<p class="soft">{html.text(line)}</p>' for line in _silent_approaches(fit)]
    blocks += ["<h2>What published laws say of this budget</h2>", _published(target)]
    if fit.backtest:
        blocks += ["<h2>Backtest: the largest budgets held out and forecast from the rest</h2>", *_backtest(fit)]
    if said := list(dict.fromkeys([*remarks, *runs.notes])):
        blocks += ["<h2>Warnings and notes</h2>", html.notes(said)]
    blocks += ["<h2>Runs</h2>", _runs(fit, runs)]
    return blocks


def _published(target_flops: float) -> str:
    """N* and D* of every published law, and the loss on its own data, which is not that of these runs."""
    rows = []
    for law in PUBLISHED:
        n, d, loss = law.allocate(target_flops)
        cells = [f"{law.n_exponent:.3f}", numbers.si(n), numbers.si(d), numbers.si(d / n)]
        rows.append([law.name, *cells, None if loss is None else f"{loss:.3f}", re.split("[,:]", law.source)[0]])
    header = ["law", "N* ∝ C^a, a", "N*", "D*", "D*/N*", "loss on its own data", "from"]
    return html.table(
        f"At {numbers.flops(target_flops)} FLOPs, each in its own way of counting N and C", header, rows
    )


def _backtest(fit: FitResult) -> list[str]:
    """What forecasts, cut by cut; then every law over all cuts, beside its weight in the forecast."""
    first = fit.backtest[0]["law"]
    cuts = [[show(row[key]) for key, show in BACKTEST.values()] for row in fit.backtest if row["law"] == first]
    weight: dict[str, float] = {}
    for m in fit.ensemble.members:
        weight[m.member.law] = weight.get(m.member.law, 0.0) + m.weight
    laws = []
    for name in dict.fromkeys(row["law"] for row in fit.backtest):
        law = law_backtest(fit.backtest, name)
        share = 1.0 if name == first else weight.get(name, 0.0)
        covered = [numbers.share(law[key]) for key in ("coverage_50", "coverage_90")]
        laws.append([name, f"{share:.0%}", f"{law['rms_error']:.2%}", *covered])
    return [
        html.table("", list(BACKTEST), cuts),
        html.table("Over all cuts", ["law", "weight in the forecast", "rms error", "inside 50%", "inside 90%"], laws),
    ]


def _runs(fit: FitResult, runs: Runs) -> str:
    """Every run with its fitted loss, folded away."""
    table = runs.table.sort_values("flops")
    predicted = fit.predict(table["n_params"].to_numpy(float), table["n_tokens"].to_numpy(float))
    table = table.assign(fitted=predicted, error=[numbers.percent(e) for e in predicted / table["loss"] - 1])
    rows = [[_plain(cell) for cell in row] for row in table.itertuples(index=False)]
    body = html.table("", list(map(str, table.columns)), rows)
    return f"<details><summary>{len(rows)} runs, smallest budget first</summary>{body}</details>"


def _approach(value: Mapping[str, Any], target_flops: float) -> list[object]:
    """A row: both exponents, N* and D* at the target; dashes where the data do not permit it."""
    if "reason" in value:
        return [None] * 4
    at = [numbers.si(value[f"{k}_coefficient"] * target_flops ** value[f"{k}_exponent"]) for k in ("n", "d")]
    return [f"{value['n_exponent']:.3f}", f"{value['d_exponent']:.3f}", *at]


def _silent_approaches(fit: FitResult) -> list[str]:
    """Why an approach has no answer."""
    return [f"Approach {name}: {value['reason']}." for name, value in fit.approaches.items() if "reason" in value]


def _plain(value: Any) -> Any:
    """A cell of the runs table: numpy's scalars as Python's, whole floats as integers."""
    if isinstance(value, np.generic):
        value = value.item()
    return int(value) if isinstance(value, float) and value.is_integer() else value
