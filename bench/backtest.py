"""What published runs of small compute say about those of large compute, law by law, beside the plain way.

Every surface of the golden data is cut: the runs above are held out, each law is fitted to those below, and the error of
its predictions is measured. Tables: mean |predicted / actual − 1| in percent, a row a data set, a column a law:
    plain        E + A/N^α + B/D^β, Huber 1e-3 on ln loss, scipy's L-BFGS-B from the best 10 of 4,500
                 starts, to convergence
    default      fit_law's default, the law left to it
    the others   that law by fit_law
"top": the two largest compute levels held out; where compute comes in no levels, the top 20% of the runs by compute, at
least a factor of 4. "rolling": everything above 1/3, 1/10 and 1/30 of the largest compute, averaged over those cuts that
leave enough below (at least --least runs). OLMo's ladder is held out as published: 1B and below predicts 7B and 13B.

python bench/backtest.py [--golden DIR] [--draws 100] [--only NAME] [--law NAME …]
Last rows: mean over the data sets; mean over the sources (a source's data sets averaged first); then default over the best
single law in hindsight and over plain (wanted: at most 1.10, below 1). At the end, the share of the runs of the top cut that
the default's intervals hold, a source's data sets averaged.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from peers import fit_many_starts, predict
from tqdm import tqdm

from analysis.inference import fit_law
from analysis.inference.backtest import LARGE_SWEEP, SMALL_SWEEP
from analysis.inference.points import compute_levels, points
from analysis.laws import LAWS
from analysis.runs import Runs
from scaling.errors import InputError, run_command
from scaling.text import table

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
PLAIN, DEFAULT = "plain", "default"
BEST = "each data set's best law"
ROLLING = (3.0, 10.0, 30.0)
LEVELS = (0.5, 0.9)


@dataclass(frozen=True)
class DataSet:
    """Runs of one surface, and what is held out."""

    source: str
    name: str
    runs: Runs
    held_out: np.ndarray
    """(n,) bool, the `top` cut."""
    rolls: bool = True
    """Whether compute cuts make sense."""


def runs_of(name: str, n: Any, d: Any, loss: Any, c: Any = None) -> Runs:
    """A table of runs; C = 6·N·D when not given."""
    n, d, loss = (np.asarray(v, float) for v in (n, d, loss))
    flops = 6 * n * d if c is None else np.asarray(c, float)
    columns = {"n_params": n, "n_tokens": d, "flops": flops, "loss": loss}
    frame = pd.DataFrame({"run_id": [f"{name} {i}" for i in range(len(n))], **columns, "status": "ok"})
    return Runs(table=frame, source=name, convention={"params": "as_given", "flops": "as_given", "loss": "as_given"})


def top_cut(runs: Runs) -> np.ndarray:
    """Mask of the two largest of a few compute levels, where they hold 5 to 40% of the runs; else of the top 20% of the runs by
    compute, at least a factor of 4."""
    data = points(runs)
    level = compute_levels(data)
    top = level >= level.max() - 1
    if level.max() + 1 <= len(runs) / 3 and 0.05 <= top.mean() <= 0.4:
        return top
    ln_c = data.log_flops
    return ln_c > min(np.quantile(ln_c, 0.8), ln_c.max() - np.log(4))


def golden_sets(folder: Path) -> list[DataSet]:
    """Every surface of the golden data."""
    out: list[DataSet] = []

    def add(source: str, name: str, runs: Runs, held_out: np.ndarray | None = None) -> None:
        out.append(DataSet(source, name, runs, top_cut(runs) if held_out is None else held_out, held_out is None))

    t = pd.read_csv(folder / "epoch_svg" / "points.csv")
    t = t[t["loss"] < t["loss"].nlargest(5).min()]
    n, c = t["Model Size"], t["Training FLOP"]
    add("epoch_svg", "epoch_svg", runs_of("epoch_svg", n, c / 6 / n, t["loss"], c))

    t = pd.read_csv(folder / "llama_3" / "points.csv")
    for name, g in t.groupby("condition"):
        add(
            "llama_3", f"llama_3 {name}", runs_of(f"llama_3 {name}", g["params"], g["tokens"], g["loss"], g["budget"])
        )

    t = pd.read_csv(folder / "porian_isoflop" / "points.csv")
    for key, g in t.groupby(["dataset", "hparams", "warmup", "decay", "param_count"]):
        name = "porian " + " ".join(map(str, key))
        add("porian", name, runs_of(name, g["n"], g["t"], g["loss"], g["flops"]))

    t = pd.read_json(folder / "gemstones" / "cool_end.jsonl", lines=True)
    add("gemstones", "gemstones", runs_of("gemstones", t["params_active_precise"], t["tokens"], t["final_loss"]))

    t = pd.read_csv(folder / "steplaw" / "dense_lr_bs_loss.csv")
    t = t.groupby(["N", "D"], as_index=False)["smooth loss"].min()
    add("steplaw", "steplaw", runs_of("steplaw", t["N"], t["D"], t["smooth loss"]))

    t = pd.read_csv(folder / "olmo_ladder" / "points.csv")
    for (metric, task), g in t.groupby(["metric", "task"]):
        name = f"olmo {task} {metric}".replace("_test_5shot", "").replace("_val_5shot", "")
        if metric == "c4":
            name = "olmo c4"
        add("olmo_ladder", name, runs_of(name, g["N"], g["D"], g["value"]), (g["mode"] == "eval").to_numpy())
    return out


def split(runs: Runs, held_out: np.ndarray) -> tuple[Runs, Runs]:
    """The runs to fit, and those held out."""
    below, above = (
        dataclasses.replace(runs, table=runs.table[m].reset_index(drop=True)) for m in (~held_out, held_out)
    )
    return below, above


def coverage(data: DataSet, draws: int) -> tuple[float, ...]:
    """Share of the held-out runs inside the default's prediction intervals of LEVELS."""
    below, above = split(data.runs, data.held_out)
    n, d, loss = (above.table[c].to_numpy(float) for c in ("n_params", "n_tokens", "loss"))
    fit = fit_law(below, draws=draws)
    ends = [fit.predict_interval(n, d, level) for level in LEVELS]
    return tuple(float(((low <= loss) & (loss <= high)).mean()) for low, high in ends)


def coverage_text(sets: Sequence[DataSet], shares: Sequence[tuple[float, ...]]) -> str:
    """A row a source, then their mean."""
    lines = [["held-out runs inside the default's interval", *(f"{100 * level:.0f}%" for level in LEVELS)]]
    rows = {o: np.mean([x for s, x in zip(sets, shares, strict=True) if s.source == o], 0) for o in sources(sets)}
    rows["mean over sources"] = np.mean(list(rows.values()), 0)
    return table([*lines, *([name, *(f"{100 * v:.0f}" for v in row)] for name, row in rows.items())])


def sources(sets: Sequence[DataSet]) -> list[str]:
    """Where the data sets are from."""
    return list(dict.fromkeys(s.source for s in sets))


def errors(runs: Runs, held_out: np.ndarray, laws: Sequence[str], draws: int) -> dict[str, float]:
    """Mean |predicted / actual − 1| on the held-out runs; laws that cannot be fitted to the others are missing."""
    below, above = split(runs, held_out)
    n, d, loss = (above.table[c].to_numpy(float) for c in ("n_params", "n_tokens", "loss"))
    out = {}
    for law in laws:
        if law == PLAIN:
            columns = (below.table[c].to_numpy(float) for c in ("n_params", "n_tokens", "loss"))
            found = predict(fit_many_starts(*columns), n, d)
        else:
            try:
                found = fit_law(
                    below, "auto" if law == DEFAULT else law, draws=draws if law == DEFAULT else 2
                ).predict(n, d)
            except InputError:
                continue
        out[law] = float(np.mean(np.abs(found / loss - 1)))
    return out


def rolling_errors(data: DataSet, laws: Sequence[str], draws: int, least: int) -> dict[str, float]:
    """`errors` averaged over the cuts of ROLLING, for the laws that can be fitted at all of them."""
    flops = data.runs.table["flops"].to_numpy(float)
    found = []
    for factor in ROLLING:
        held_out = flops > flops.max() / factor * (1 + 1e-6)
        if (~held_out).sum() >= least:
            found.append(errors(data.runs, held_out, laws, draws))
    return {law: float(np.mean([f[law] for f in found])) for law in laws if found and all(law in f for f in found)}


def summary(sets: Sequence[DataSet], rows: Sequence[dict[str, float]], laws: Sequence[str]) -> dict[str, Any]:
    """Means over data sets and over sources, of the laws that are there for every data set; the ratios of the default."""
    everywhere = [law for law in laws if all(law in row for row in rows)]
    by_set = {law: float(np.mean([row[law] for row in rows])) for law in everywhere}
    by_source = {
        law: float(
            np.mean(
                [np.mean([r[law] for s, r in zip(sets, rows, strict=True) if s.source == o]) for o in sources(sets)]
            )
        )
        for law in everywhere
    }
    out: dict[str, Any] = {"mean over data sets": by_set, "mean over sources": by_source}
    for name, means in list(out.items()):
        single = {law: value for law, value in means.items() if law not in (PLAIN, DEFAULT)}
        if DEFAULT in means and single:
            best = min(single, key=lambda law: single[law])
            out[f"ratios, {name}"] = {"best law": best, "over best law": means[DEFAULT] / single[best]}
            if PLAIN in means:
                out[f"ratios, {name}"]["over plain"] = means[DEFAULT] / means[PLAIN]
    each = [min(v for law, v in row.items() if law != DEFAULT) for row in rows]
    out[BEST] = float(np.mean(each))
    return out


def text(title: str, sets: Sequence[DataSet], rows: Sequence[dict[str, float]], laws: Sequence[str]) -> str:
    """One table with its last rows."""

    def cells(row: dict[str, float]) -> list[str]:
        return [f"{100 * row[law]:.3f}" if law in row else "–" for law in laws]

    lines = [[title, "runs", "held out", *laws]]
    for s, row in zip(sets, rows, strict=True):
        lines.append([s.name, str(len(s.runs)), str(int(s.held_out.sum())), *cells(row)])
    found = summary(sets, rows, laws)
    lines += [[name, "", "", *cells(found[name])] for name in ("mean over data sets", "mean over sources")]
    parts = [table(lines)]
    for name, ratios in found.items():
        if name.startswith("ratios"):
            best = f"default / best single law ({ratios['best law']}) {ratios['over best law']:.3f}"
            plain = f", default / plain {ratios['over plain']:.3f}" if "over plain" in ratios else ""
            parts.append(f"{name.removeprefix('ratios, ')}: {best}{plain}")
    parts.append(f"mean over data sets if each had its best law in hindsight: {100 * found[BEST]:.3f}")
    return "\n".join(parts)


def main(argv: list[str]) -> None:
    """Fit everything and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--golden", type=Path, default=GOLDEN, metavar="DIR", help="folder of the golden data")
    parser.add_argument("--only", default="", metavar="TEXT", help="data sets whose name contains this")
    parser.add_argument("--law", nargs="+", default=None, help="instead of the laws of the ensembles")
    parser.add_argument("--draws", type=int, default=100, help="bootstrap refits of the default (default 100)")
    parser.add_argument(
        "--least", type=int, default=12, help="runs that a rolling cut must leave below it (default 12)"
    )
    parser.add_argument("--no-rolling", action="store_true", help="the top cut alone")
    parser.add_argument("--json", metavar="-", choices=["-"], help="- : one JSON object instead of the tables")
    args = parser.parse_args(argv)
    if not args.golden.is_dir():
        raise InputError(f"no golden data at {args.golden}: give their folder, --golden DIR")
    sets = [s for s in golden_sets(args.golden) if args.only in s.name]
    if not sets:
        raise InputError(f"--only {args.only!r}: no data set has that in its name")
    names = args.law or list(dict.fromkeys((*LARGE_SWEEP, *SMALL_SWEEP)))
    for name in names:
        if name not in LAWS:
            raise InputError(f"--law {name}: valid are {', '.join(LAWS)}")
    laws = [PLAIN, DEFAULT, *names]
    start = time.perf_counter()
    top, rolling = [], []
    for data in tqdm(sets, unit="data set", disable=None):
        top.append(errors(data.runs, data.held_out, laws, args.draws))
        rolling.append(
            rolling_errors(data, laws, args.draws, args.least) if data.rolls and not args.no_rolling else {}
        )
    usable = [law for law in laws if any(law in row for row in top)]
    rolled = [(s, r) for s, r in zip(sets, rolling, strict=True) if r]
    tables = {"top": (sets, top), "rolling": ([s for s, _ in rolled], [r for _, r in rolled])}
    if args.json:
        answer = {
            name: {
                "errors": {s.name: row for s, row in zip(chosen, rows, strict=True)},
                **summary(chosen, rows, usable),
            }
            for name, (chosen, rows) in tables.items()
            if chosen
        }
        print(json.dumps(answer, allow_nan=False))
        return
    for name, (chosen, rows) in tables.items():
        if chosen:
            print(text(f"{name}: mean |error|, %", chosen, rows, usable), end="\n\n")
    print(coverage_text(sets, [coverage(s, args.draws) for s in sets]), end="\n\n")
    print(f"{len(sets)} data sets in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    run_command(main)
