"""ENTRY python -m analysis.recipe: the learning-rate and batch law of one's own sweep, for recipe=measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.inference.hyperparameters import (
    Cell,
    HyperLaw,
    cells,
    check,
    fit_laws,
    is_separable,
    one_size_out,
)
from analysis.runs import load_runs
from analysis.show.numbers import percent, si
from analysis.show.text import table
from scaling.accounting import PARAMS_CONVENTIONS
from scaling.errors import InputError, run_command
from scaling.files import write_json

_HELP = """example:
  python -m scaling.sweep +grid=lr                       learning rate × batch at three sizes
  python -m analysis.recipe sweeps/lr --out conf/recipe/measured.json
  python -m scaling.sweep +grid=demo recipe=measured     runs that use the law
Check it one step out: train a fourth, larger size in another sweep and give it as --verify."""


def main(argv: list[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.recipe",
        description="Fit peak_lr = c·N^a·D^b and batch_tokens = c·D^b to a sweep over learning rate, batch and size.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sweep", type=Path, help="sweep directory, or a file with columns peak_lr and batch_tokens too"
    )
    parser.add_argument(
        "--verify", type=Path, metavar="SWEEP2", help="runs that were not fitted: predicted against measured"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the law here, for recipe=measured recipe.path=FILE"
    )
    parser.add_argument("--convention", default="body_head", choices=PARAMS_CONVENTIONS, help="which N counts")
    parser.add_argument(
        "--json", metavar="-", choices=["-"], help="- : print the law as one JSON object and nothing else"
    )
    args = parser.parse_args(argv)
    answer = measure(args.sweep, args.verify, args.convention)
    if args.out is not None:
        write_json(args.out, answer)
    print(json.dumps(answer, allow_nan=False) if args.json else _text(answer, args.out))
    return 0


def measure(sweep: Path, verify: Path | None, convention: str) -> dict[str, Any]:
    """The law with what it rests on: what `recipe=measured` reads, and cells, checks and notes beside it.

    Raises:
        InputError: runs at fewer than two sizes, or too few learning rates.
    """
    runs = load_runs(sweep, convention=convention)
    found = cells(runs)
    sizes = sorted({c.n_params for c in found})
    if len(sizes) < 2:
        raise InputError(
            f"{sweep}: learning rates were swept at one size only (N = {sizes[0]:.4g}); a law needs two, a check three"
        )
    separable = is_separable(found)
    lr, batch = fit_laws(found, separable)
    checks = one_size_out(found, separable, batch)
    verified = check(lr, cells(load_runs(verify, convention=convention))) if verify is not None else []
    tokens = [c.n_tokens for c in found]
    return {
        "peak_lr": _law(lr),
        "batch_tokens": _law(batch),
        "params": convention,
        "source": f"{len(runs)} runs of {sweep}",
        "n_range": [sizes[0], sizes[-1]],
        "d_range": [min(tokens), max(tokens)],
        "cells": [c.to_dict() for c in found],
        "one_size_out": checks,
        "verified": verified,
        "notes": [*_notes(found, separable), *runs.notes],
    }


def _law(law: HyperLaw) -> dict[str, Any]:
    fields: dict[str, Any] = {k: getattr(law, k) for k in ("coefficient", "n_exponent", "d_exponent")}
    for name in ("n", "d"):
        half = getattr(law, f"{name}_half_width")
        if half is not None:
            value = fields[f"{name}_exponent"]
            fields[f"{name}_exponent_interval_95"] = [value - half, value + half]
    return fields


def _notes(found: Sequence[Cell], separable: bool) -> list[str]:
    notes = []
    if not separable:
        notes.append(
            "D/N hardly varies over the cells: the exponents of N and D cannot be told apart, so D's is fixed at 0 and "
            "N's carries both; the law holds along this D/N"
        )
    notes += [
        f"at N = {si(c.n_params)} the best learning rate is at the edge of those tried: widen the grid"
        for c in found
        if not c.lr.inside
    ]
    unmeasured = [c for c in found if c.batch.curvature == 0]
    if unmeasured:
        notes.append(
            f"{len(unmeasured)} of {len(found)} cells show no minimum over batch (fewer than three, or loss still "
            "falling): the batch law there goes through the best batch tried"
        )
    return notes


def _text(answer: dict[str, Any], out: Path | None) -> str:
    rows = [
        (
            si(c["n_params"]),
            si(c["n_tokens"]),
            c["n_runs"],
            f"{c['peak_lr']:.3e}" + ("" if c["peak_lr_inside"] else " (edge)"),
            "{:.2e} – {:.2e}".format(*c["peak_lr_interval_95"]),
            f"{c['batch_tokens']:.0f}" + ("" if c["batch_inside"] else " (edge)"),
            f"{c['loss']:.4f}",
            percent(c["penalty_lr_2x"]),
        )
        for c in answer["cells"]
    ]
    header = ["N", "D", "runs", "best peak_lr", "95% interval", "best batch", "loss", "LR off by 2×"]
    parts = [answer["source"], table(header, rows), ""]
    for name in ("peak_lr", "batch_tokens"):
        law = answer[name]
        spans = [f"{k}: {v[0]:.3f} to {v[1]:.3f}" for k, v in law.items() if k.endswith("_95")]
        formula = f"{name} = {law['coefficient']:.4g} · N^{law['n_exponent']:.3f} · D^{law['d_exponent']:.3f}"
        parts.append(f"{formula}   ({', '.join(spans)})")
    for key, title in (
        ("one_size_out", "each size predicted from the others"),
        ("verified", "runs that were not fitted"),
    ):
        if answer[key]:
            checked = [
                (
                    si(r["n_params"]),
                    si(r["n_tokens"]),
                    f"{r['predicted_peak_lr']:.3e}",
                    f"{r['measured_peak_lr']:.3e}",
                    percent(r["regret"], 3),
                )
                for r in answer[key]
            ]
            parts += ["", title, table(["N", "D", "predicted", "measured", "loss given up"], checked)]
    parts += [f"note: {note}" for note in answer["notes"]]
    return "\n".join([*parts, *([f"law: {out}"] if out else [])])


if __name__ == "__main__":
    run_command(main)
