"""What analysis.fit prints: plain tables that fit a terminal, read from top to bottom."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from analysis.decide.answer import Answer
from analysis.decide.forecast import extrapolation_colour
from analysis.decide.limits import NONE, Limits
from analysis.inference import FitResult
from analysis.inference.diagnostics import OUTLIER, Effect
from analysis.inference.holdout import HoldOut
from analysis.laws import PUBLISHED
from analysis.show.backtest import law_backtest
from analysis.show.numbers import flops, interval, percent, rounded, share, si
from scaling.records import Forecast

_APPROACHES = {"1": "1 envelope", "2": "2 IsoFLOP parabolas", "3": "3 surface, C = 6ND"}
_MOST_ROWS = 60


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


def answer_text(said: Answer, colour: bool = False) -> str:
    """The whole answer for a terminal; colour: red extrapolations in red."""
    fit, runs = said.fit, said.runs
    counted = f"N {runs.convention['params']}, FLOPs {runs.convention['flops']}, loss {runs.convention['loss']}"
    parts = [
        f"{fit.n_runs} runs of {runs.source} ({counted}), the largest {flops(fit.largest_flops)} FLOPs",
        *(f"note: {note}" for note in runs.notes),
        "",
        f"law {fit.law}: {fit.surface.formula}   ({fit.surface.source})",
        _parameters(said),
        _quality(said),
        "",
        _forecaster(fit),
    ]
    if said.allocations:
        title = f"best for a budget within {said.limits}" if said.limits.names else "compute-optimal for a budget"
        parts += ["", title, _allocations(said, colour), "", "how sure that is", _sureness(said)]
    if said.costs:
        from analysis.show.plan import cost_lines, plan_lines

        parts += ["", *cost_lines(said.costs, said.allocations)]
        parts += ["", *plan_lines(said.plan)] if said.plan is not None else []
    if said.experts:
        from analysis.show.plan import experts_lines

        for choice in said.experts:
            parts += ["", *experts_lines(choice)]
    if said.target is not None:
        parts += ["", f"the cheapest compute for a loss of {said.target.loss:g}", _target(said, colour)]
    if said.predictions:
        parts += ["", "predictions", _predictions(said.predictions)]
    if said.allocations:
        parts += ["", "three approaches to N* and D*, beside what forecasts", _approaches(said)]
        parts += ["", "published laws at these budgets: N* / D* → loss on their own data", _published(said.budgets)]
    parts += ["", "backtest: fitted up to a cut in compute, asked about everything above it", _backtest(fit)]
    if len({(f"{c.alpha:.3f}", f"{c.n_exponent_isoflop}") for c in said.conventions}) > 1:
        parts += [
            "",
            "how the exponents move with the counting (Chinchilla's law, plain; N* ∝ C^a)",
            _conventions(said),
        ]
    parts += ["", "diagnostics", _diagnostics(said)]
    if said.warnings:
        parts += ["", *(f"warning: {w}" for w in said.warnings)]
    return "\n".join(parts)


def _parameters(said: Answer) -> str:
    """Values with the digits that their intervals support."""
    rows, held = [], dict(said.fit.surface.fixed)
    for name, value in said.fit.parameters.items():
        low, high = said.fit.intervals[name]
        if name in held:
            rows.append([name, f"= {held[name]}", "held"])
        elif said.diagnostics.identified[name]:
            rows.append([name, *rounded(value, low, high)])
        else:
            rows.append([name, "not identified", _weak(said, name, rounded(value, low, high)[1])])
    return table(["parameter", "value", "95% interval"], rows)


def _weak(said: Answer, name: str, bootstrap: str) -> str:
    """The profile interval of a parameter that is not identified, its open sides said; else the bootstrap's."""
    if name in said.profiles:
        low, high = said.profiles[name]
        if low is None and high is None:
            return "open on both sides (profile)"
        return f"{'open' if low is None else f'{low:.2g}'} – {'open' if high is None else f'{high:.2g}'} (profile)"
    return bootstrap if said.fit.n_cells > len(said.fit.surface.free) else "–"


def _quality(said: Answer) -> str:
    fit = said.fit
    seeds = "no replicates" if fit.seed_noise is None else f"{100 * fit.seed_noise:.2f}%"
    return (
        f"  objective {fit.objective:.6g} ({said.robust.name}); {fit.starts_agreeing} of {fit.starts} starts agree, condition "
        f"{fit.condition:.2g}\n"
        f"  run noise {100 * fit.run_noise:.2f}% of loss (seeds: {seeds}); "
        f"law-form error {100 * fit.form.per_efold:.2f}% per e-fold of compute"
    )


def _forecaster(fit: FitResult) -> str:
    members = fit.ensemble.members
    if len(members) == 1:
        return f"what forecasts: the law {members[0].member.law} alone"
    laws = dict.fromkeys(m.member.law for m in members)
    emphases = sorted({m.member.emphasis or 0.0 for m in members})
    rows = []
    for law in laws:
        weight = {m.member.emphasis or 0.0: m.weight for m in members if m.member.law == law}
        cells = [f"{weight[k]:.0%}" if k in weight else "–" for k in emphases]
        rows.append((sum(weight.values()), [law, *cells, f"{sum(weight.values()):.0%}"]))
    header = ["law", *(f"k = {k:g}" for k in emphases), "weight"]
    return (
        "what forecasts: a mean of ln loss over laws, weighed by backtest; k: a run counts (C / largest C)^k\n"
        + table(header, [row for _, row in sorted(rows, key=lambda r: -r[0])])
    )


def _reach(fit: FitResult, budget_flops: float) -> str:
    ratio = fit.extrapolation_ratio(budget_flops)
    return f"{ratio:.3g}× {extrapolation_colour(ratio)}"


def _red(text: str, colour: bool) -> str:
    return text.replace("× red", "× \033[31mred\033[0m") if colour else text


def _allocations(said: Answer, colour: bool) -> str:
    rows = [
        (
            flops(a.budget_flops),
            si(a.n_params),
            si(a.n_tokens),
            f"{a.n_tokens / a.n_params:.3g}",
            f"{a.loss:.4f}",
            interval(a.interval_50),
            interval(a.interval_90),
            _reach(said.fit, a.budget_flops),
        )
        for a in said.allocations
    ]
    header = ["C", "N*", "D*", "D/N", "loss", "50% interval", "90% interval", "extrapolation"]
    return _red(table(header, rows), colour)


def _sureness(said: Answer) -> str:
    """Interval of N*, sizes that are as good, what a wrong exponent costs, batch; and what the limits cost."""

    def ends(pair: tuple[float | None, float | None]) -> str:
        low, high = ("open" if end is None else si(end, 2) for end in pair)
        return f"{low} – {high}"

    rows, lines = [], []
    for a in said.allocations:
        sure = a.sureness
        cells = (ends(sure.n_interval), ends(sure.d_interval), ends(sure.flat))
        regret = " / ".join(f"{100 * r:.2g}%" for r in sure.regret)
        rows.append([flops(a.budget_flops), *cells, regret, ends(a.batch_tokens)])
        if a.held is not None:
            in_all, met = map(si, a.held)
            lines.append(f"  {flops(a.budget_flops)}: {in_all} parameters in all, of which a token meets {met}")
        if a.epochs is not None and a.epochs > 1:
            worth = f"  {flops(a.budget_flops)}: a repeated token's worth is {said.limits.repetition}"
            if a.repetition is not None:
                worth += "; loss {:.4f} to {:.4f} at its ends, which the intervals above do not hold".format(
                    *a.repetition
                )
            lines.append(worth)
        if a.unlimited is not None:
            n, d, loss = a.unlimited
            spent = "" if a.train_flops > 0.999 * a.budget_flops else f"; training takes {flops(a.train_flops)}"
            epochs = "" if a.epochs is None else f"; {a.epochs:.3g} epochs"
            lines.append(
                f"  {flops(a.budget_flops)} without the limits: {si(n)} on {si(d)}, loss {loss:.4f} "
                f"({percent(a.loss / loss - 1)} given up){epochs}{spent}"
            )
    header = [
        "C",
        "N* 90%",
        "D* 90%",
        "N within 0.1% of the least loss",
        "loss given up if wrong",
        "batch, B_opt – B_crit",
    ]
    note = "  given up if wrong: by this N if the exponents sit where N* is at the low / high end of its interval"
    return "\n".join([table(header, rows), *lines, note])


def _target(said: Answer, colour: bool) -> str:
    target = said.target
    assert target is not None

    def between(pair: tuple[float | None, float | None]) -> str:
        low = "less than the smallest run" if pair[0] is None else flops(pair[0])
        return f"{low} – {'out of reach' if pair[1] is None else flops(pair[1])}"

    row = (
        flops(target.budget_flops),
        si(target.n_params),
        si(target.n_tokens),
        between(target.interval_50),
        between(target.interval_90),
        _reach(said.fit, target.budget_flops),
    )
    return _red(table(["C", "N*", "D*", "50% interval of C", "90% interval of C", "extrapolation"], [row]), colour)


def _predictions(predictions: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            si(p["n_params"], 4),
            si(p["n_tokens"], 4),
            f"{p['loss']:.4f}",
            *(interval(p[f"interval_{k}"], 4) for k in (50, 90)),
        )
        for p in predictions
    ]
    return table(["N", "D", "loss", "50% interval", "90% interval"], rows)


def _approaches(said: Answer) -> str:
    """Approaches by budgets, with the difference from the forecast's optimum and what following them would waste."""
    rows, missing = [], []
    for key, value in said.approaches.items():
        if "reason" in value:
            missing.append(f"  no approach {key}: {value['reason']}")
            continue
        for i, at in enumerate(value["allocations"]):
            name = [_APPROACHES[key], f"{value['n_exponent']:.3f}"] if i == 0 else ["", ""]
            cells = [flops(at["budget_flops"]), si(at["n_params"]), si(at["n_tokens"])]
            if "wasted_compute" in at:
                cells += [
                    f"{1 + at['n_vs_surface']:.3g}×",
                    f"{1 + at['d_vs_surface']:.3g}×",
                    f"{max(at['wasted_compute'], 0.0):.1%}",
                ]
            rows.append([*name, *cells, *["–"] * (6 - len(cells))])
    header = ["approach", "N* ∝ C^", "C", "N*", "D*", "N* over forecast's", "D* over", "wasted compute"]
    replayed = [
        f"  approach 2 replayed without noise on this grid and the fitted surface: {percent(b['n_params'], 1)} in N*, "
        f"{percent(b['n_tokens'], 1)} in D* at {flops(b['budget_flops'])}"
        for b in said.approaches["2"].get("bias", {}).get("budgets", ())
    ]
    return "\n".join([*([table(header, rows)] if rows else []), *replayed, *missing])


def _published(budgets: Sequence[float]) -> str:
    rows = []
    for law in PUBLISHED:
        points = [law.allocate(c) for c in budgets]
        cells = [f"{si(n)} / {si(d)} → {'–' if loss is None else f'{loss:.3f}'}" for n, d, loss in points]
        rows.append([law.name, f"{law.n_exponent:.3f}", *cells])
    return table(["law", "N* ∝ C^", *(flops(c) for c in budgets)], rows)


def _backtest(fit: FitResult) -> str:
    """What forecasts cut by cut, then every law over all cuts."""
    if not fit.backtest:
        return "  none: it takes runs over a factor 2 in compute below a cut, and some above it"
    first = fit.backtest[0]["law"]
    rows = [
        (
            flops(r["cut_flops"]),
            r["n_fitted"],
            r["n_held_out"],
            f"{r['ratio']:.3g}×",
            percent(-r["mean_error"]),
            f"{100 * r['rms_error']:.2f}%",
            share(r["coverage_50"]),
            share(r["coverage_90"]),
        )
        for r in fit.backtest
        if r["law"] == first
    ]
    cuts = table(["cut", "fitted", "held out", "up to", "mean error", "rms", "in 50%", "in 90%"], rows)
    laws = [law_backtest(fit.backtest, law) for law in dict.fromkeys(r["law"] for r in fit.backtest)]
    lines = [
        (
            law["law"],
            "–" if law["emphasis"] is None else f"{law['emphasis']:g}",
            law["cuts"],
            f"{100 * law['rms_error']:.2f}%",
            share(law["coverage_50"]),
            share(law["coverage_90"]),
        )
        for law in laws
    ]
    by_law = table(["law, over all cuts", "its best k", "cuts", "rms", "in 50%", "in 90%"], lines)
    return f"  {first}, cut by cut\n{cuts}\n\n{by_law}"


def _conventions(said: Answer) -> str:
    rows = [
        (
            f"N {c.params}, C {c.flops}",
            f"{c.alpha:.3f}",
            f"{c.beta:.3f}",
            "–" if c.n_exponent is None else f"{c.n_exponent:.3f}",
            "–" if c.n_exponent_isoflop is None else f"{c.n_exponent_isoflop:.3f}",
            "–" if c.n_params is None else si(c.n_params),
        )
        for c in said.conventions
    ]
    at = flops(said.budgets[0])
    return table(["counting", "alpha", "beta", "a, surface", "a, IsoFLOP", f"surface's N* at {at}"], rows)


def _diagnostics(said: Answer) -> str:
    found = said.diagnostics
    lines = [f"  residuals of {said.fit.law}: spread {100 * found.scale:.2f}% (robust)"]
    if found.outliers:
        named = f", the {len(found.outliers)} furthest named" if found.n_outliers > len(found.outliers) else ""
        lines += [
            f"  {found.n_outliers} of {said.fit.n_runs} runs stand out (|z| > {OUTLIER:g}){named}; leaving each out would change:",
            _effects(found.outliers),
            "  a run above the law may be mis-tuned or cut short: look at it before --drop RUN_ID leaves it out",
        ]
    else:
        lines.append(f"  no run stands out (|z| > {OUTLIER:g})")
    if found.influential:
        lines += [
            "  the runs that the law's forecast leans on most; leaving each out would change:",
            _effects(found.influential),
        ]
    return "\n".join([*lines, *(f"  {line}" for line in found.identification)])


def _effects(effects: Sequence[Effect]) -> str:
    shown = [k for k in effects[0].parameters if k not in ("A", "B")]
    rows = [
        (
            e.run_id,
            f"{e.z:+.1f}",
            *(f"{e.parameters[k]:+.2g}" for k in shown),
            *("–" if shift is None else percent(shift) for shift in (e.law_loss_at_target, e.loss_at_target)),
        )
        for e in effects
    ]
    return table(["run", "z", *shown, "law's loss at the budget", "forecast's"], rows)


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
        for r in held.rows[:_MOST_ROWS]
    ]
    header = ["held-out run", "C", "N", "D", "forecast", "actual", "error", "in 50%", "in 90%"]
    laws = table(["law", "rms error"], [[name, f"{100 * error:.2f}%"] for name, error in held.by_law.items()])
    inside = [sum(r[f"inside_{level}"] for r in held.rows) for level in (50, 90)]
    what = "ensemble" if len(held.fit.ensemble.members) > 1 else f"law {held.fit.law}"
    more = [f"  and {len(held.rows) - _MOST_ROWS:,} more: --json - lists all"] if len(held.rows) > _MOST_ROWS else []
    return "\n".join(
        [
            f"{what} fitted on {held.fit.n_runs} runs up to {flops(held.cut_flops)} FLOPs",
            table(header, rows),
            *more,
            f"  {inside[0]} of {len(held.rows)} inside the 50% interval, {inside[1]} inside the 90% interval",
            "",
            laws,
        ]
    )


def forecast_text(forecast: Forecast, path: object) -> str:
    """The forecast in two lines."""
    shape, limits = forecast.spec.shape, Limits(**forecast.limits)
    within = f"; within {limits}" if limits != NONE else ""
    return (
        f"forecast at {flops(forecast.spec.flops)} FLOPs: loss {forecast.loss:.4f}, 50% {interval(forecast.interval_50, 4)}, "
        f"90% {interval(forecast.interval_90, 4)}\n"
        f"  width {shape.width}, depth {shape.depth}, {si(forecast.spec.tokens)} tokens{within}; sealed in {path}"
    )
