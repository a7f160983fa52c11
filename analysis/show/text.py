"""What analysis.fit prints: plain tables that fit a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from analysis.decide import Allocation
from analysis.decide.forecast import extrapolation_colour
from analysis.inference import FitResult
from analysis.inference.holdout import HoldOut
from analysis.laws import PUBLISHED
from analysis.runs import Runs
from analysis.show.numbers import flops, interval, percent, si
from scaling.records import Forecast


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    cells = [list(header), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def fit_text(fit: FitResult, runs: Runs, allocations: Sequence[Allocation], approaches: dict[str, Any]) -> str:
    """The whole answer for a terminal."""
    convention = f"N {runs.convention['params']}, FLOPs {runs.convention['flops']}"
    parts = [
        f"{fit.n_runs} runs of {runs.source} ({convention}), the largest {flops(fit.largest_flops)} FLOPs",
        *(f"note: {note}" for note in runs.notes),
        "",
        f"law {fit.law}: {fit.surface.formula}   ({fit.surface.source})",
        table(
            ["parameter", "value", "95% interval"],
            [[k, f"{v:.5g}", "{:.4g} – {:.4g}".format(*fit.intervals[k])] for k, v in fit.parameters.items()],
        ),
        _quality(fit),
    ]
    if allocations:
        parts += ["", "compute-optimal for a budget", _allocations(fit, allocations)]
        parts += [
            "",
            "the three approaches and published laws at these budgets",
            _side_by_side(approaches, allocations),
        ]
    parts += ["", "backtest: fitted up to a cut in compute, asked about everything above it", _backtest(fit)]
    if fit.warnings:
        parts += ["", *(f"warning: {w}" for w in fit.warnings)]
    return "\n".join(parts)


def _quality(fit: FitResult) -> str:
    seeds = "no replicates" if fit.seed_noise is None else f"{100 * fit.seed_noise:.2f}%"
    return (
        f"  objective {fit.objective:.6g}; run noise {100 * fit.run_noise:.2f}% of loss (seeds: {seeds}); "
        f"law-form error {100 * fit.form.per_efold:.2f}% per e-fold of compute"
    )


def _allocations(fit: FitResult, allocations: Sequence[Allocation]) -> str:
    rows = [
        (
            flops(a.budget_flops),
            si(a.n_params),
            si(a.n_tokens),
            f"{a.n_tokens / a.n_params:.3g}",
            f"{a.loss:.4f}",
            interval(a.interval_50),
            interval(a.interval_90),
            f"{(ratio := fit.extrapolation_ratio(a.budget_flops)):.3g}× {extrapolation_colour(ratio)}",
        )
        for a in allocations
    ]
    return table(["C", "N*", "D*", "D/N", "loss", "50% interval", "90% interval", "extrapolation"], rows)


def _side_by_side(approaches: dict[str, Any], allocations: Sequence[Allocation]) -> str:
    names = {"1": "1 envelope", "2": "2 IsoFLOP parabolas", "3": "3 surface, C = 6ND"}
    rows, missing = [], []
    for key, value in approaches.items():
        if "reason" in value:
            missing.append(f"  no approach {key}: {value['reason']}")
            continue
        cells = [f"{si(p['n_params'])} / {si(p['n_tokens'])}" for p in value["allocations"]]
        rows.append([names[key], f"{value['n_exponent']:.3f}", *cells])
    for law in PUBLISHED:
        points = [law.allocate(a.budget_flops) for a in allocations]
        cells = [f"{si(n)} / {si(d)} → {'–' if loss is None else f'{loss:.3f}'}" for n, d, loss in points]
        rows.append([law.name, f"{law.n_exponent:.3f}", *cells])
    header = ["N* / D*", "N* ∝ C^", *(flops(a.budget_flops) for a in allocations)]
    return "\n".join([table(header, rows), *missing])


def _backtest(fit: FitResult) -> str:
    if not fit.backtest:
        return "  none: it takes runs over a factor 2 in compute below a cut, and some above it"
    rows = [
        (
            flops(r["cut_flops"]),
            r["n_fitted"],
            r["n_held_out"],
            f"{r['ratio']:.3g}×",
            percent(-r["mean_error"]),
            f"{100 * r['rms_error']:.2f}%",
            f"{r['coverage_50']:.0%}",
            f"{r['coverage_90']:.0%}",
        )
        for r in fit.backtest
        if r["law"] == fit.law
    ]
    errors: dict[str, list[float]] = {}
    for r in fit.backtest:
        errors.setdefault(r["law"], []).append(r["rms_error"] ** 2)
    others = ", ".join(f"{law} {100 * (sum(e) / len(e)) ** 0.5:.2f}%" for law, e in errors.items())
    header = ["cut", "fitted", "held out", "ratio", "mean error", "rms", "in 50%", "in 90%"]
    return table(header, rows) + f"\n  rms over the cuts by law: {others}"


def hold_out_text(held: HoldOut) -> str:
    """The held-out runs with what was forecast for them, and every law's error."""
    rows = [
        (
            r["run_id"],
            flops(r["flops"]),
            si(r["n_params"]),
            si(r["n_tokens"]),
            f"{r['predicted']:.4f}",
            f"{r['loss']:.4f}",
            percent(r["relative_error"]),
            "yes" if r["inside_50"] else "no",
            "yes" if r["inside_90"] else "no",
        )
        for r in held.rows
    ]
    header = ["held-out run", "C", "N", "D", "forecast", "actual", "error", "in 50%", "in 90%"]
    laws = table(["law", "rms error"], [[name, f"{100 * error:.2f}%"] for name, error in held.by_law.items()])
    first = f"law {held.fit.law} fitted on {held.fit.n_runs} runs up to {flops(held.cut_flops)} FLOPs"
    return "\n".join([first, table(header, rows), "", laws])


def forecast_text(forecast: Forecast, path: object) -> str:
    """The forecast in two lines."""
    shape = forecast.spec.shape
    return (
        f"forecast at {flops(forecast.spec.flops)} FLOPs: loss {forecast.loss:.4f}, 50% {interval(forecast.interval_50, 4)}, "
        f"90% {interval(forecast.interval_90, 4)}\n"
        f"  width {shape.width}, depth {shape.depth}, {si(forecast.spec.tokens)} tokens; sealed in {path}"
    )
