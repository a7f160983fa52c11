"""One self-contained HTML page: the forecast and what came of it first, then plots, law, evidence and provenance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.show import html, numbers, plots
from analysis.show.backtest import law_backtest
from analysis.show.style import DARK, LIGHT, Theme, png, save
from scaling.files import write_text
from scaling.provenance import git_commit, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.inference import FitResult
    from analysis.runs import Runs
    from scaling.records import Forecast

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
PACKAGES = ("isoflop", "numpy", "scipy", "pandas", "matplotlib")


@dataclass(frozen=True)
class Outcome:
    """What came of a forecast: `analysis.postmortem` makes it."""

    summary: Mapping[str, Any]
    """The object of postmortem.json."""
    metrics: Sequence[Mapping[str, Any]]
    """Rows of the flagship's metrics.jsonl."""
    run: str
    """The flagship's folder, as given."""
    refit: FitResult | None = None
    """The law fitted again with the flagship among the runs; None when the sweep is not at hand."""
    next_target: Mapping[str, Any] = field(default_factory=dict)
    """flops, n_params, n_tokens, loss_before, interval_90_before, loss, interval_90: 10× the flagship, before and after."""

    @property
    def actual(self) -> float:
        """The flagship's held-out loss, nats per token."""
        return float(self.summary["actual_loss"])

    @property
    def verdict(self) -> tuple[str, str]:
        """(sentence, colour) on where the actual loss fell."""
        if self.summary["inside_50"]:
            return "inside the 50% interval", "green"
        if self.summary["inside_90"]:
            return "inside the 90% interval", "green"
        return "outside the 90% interval", "red"


def write_report(
    out: Path, fit: FitResult, runs: Runs, forecast: Forecast | None = None, postmortem: Outcome | None = None
) -> Path:
    """Write out/report.html and out/plots/*.png, each atomically.

    Args:
        out: the folder; made when missing.
        fit: the law, as fitted before the flagship ran.
        runs: the runs it was fitted on.
        forecast: the sealed forecast, when one was made.
        postmortem: what came of it, when the flagship has run.
    Returns:
        The page's path.
    """
    title = (
        f"Loss forecast at {numbers.flops(forecast.spec.flops)} FLOPs"
        if forecast
        else f"Scaling law of {runs.source}"
    )
    body = [
        f"<header><h1>{html.text(title)}</h1>",
        f'<p class="soft">{html.text(_subtitle(fit, runs, forecast))}</p></header>',
        f'<div class="cards">{"".join(_headline(fit, runs, forecast, postmortem))}</div>',
    ]
    if forecast:
        body += ["<h2>What was forecast</h2>", f'<div class="columns">{_plan(forecast)}</div>']
    body += [
        "<h2>Plots</h2>",
        f'<div class="columns">{"".join(_figures(out, fit, runs, forecast, postmortem))}</div>',
    ]
    body += ["<h2>The law</h2>", f'<div class="columns">{_law(fit, postmortem)}</div>']
    body += _evidence(fit, runs, forecast)
    body += ["<h2>Where this comes from</h2>", *_provenance(runs, forecast, postmortem)]
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    path = out / "report.html"
    write_text(path, html.page(title, css, body))
    return path


def _subtitle(fit: FitResult, runs: Runs, forecast: Forecast | None) -> str:
    text = f"{fit.law} law fitted on {fit.n_runs} runs of {runs.source}"
    if forecast:
        largest = float(runs.table["flops"].max())
        text += f", the largest {numbers.flops(largest)} FLOPs; sealed {forecast.created}"
    return text


def _headline(fit: FitResult, runs: Runs, forecast: Forecast | None, postmortem: Outcome | None) -> list[str]:
    if forecast is None:
        budget = 10 * float(runs.table["flops"].max())
        n, d = plots.frontier(fit, runs.table, np.array([budget]))
        low, high = (float(side[0]) for side in fit.predict_interval(n, d, 0.9))
        return [
            html.card("Runs", str(fit.n_runs), under=runs.source),
            html.card(
                f"Forecast at {numbers.flops(budget)} FLOPs",
                f"{float(fit.predict(n, d)[0]):.3f}",
                under=f"90% interval {numbers.interval((low, high))}; 10× the largest run",
            ),
            html.card(
                "Compute-optimal there",
                f"{numbers.si(float(n[0]))}",
                "parameters",
                f"{numbers.si(float(d[0]))} tokens",
            ),
        ]
    reach_colour = forecast.extrapolation_colour
    reach = html.card(
        "Extrapolation",
        f"{forecast.extrapolation_ratio:.1f}×",
        under=f"{reach_colour}: over the largest run's compute",
        colour=reach_colour,
    )
    predicted = html.card(
        "Forecast", f"{forecast.loss:.3f}", "nats per token", f"90% interval {numbers.interval(forecast.interval_90)}"
    )
    if postmortem is None:
        return [predicted, html.card("Actual", "not yet", under="the flagship has not run"), reach]
    sentence, colour = postmortem.verdict
    error = numbers.percent(postmortem.summary["relative_error"])
    return [
        predicted,
        html.card("Actual", f"{postmortem.actual:.3f}", "nats per token", sentence, colour),
        html.card("Forecast error", error, under="forecast over actual, less one"),
        reach,
    ]


def _plan(forecast: Forecast) -> str:
    spec, counted = forecast.spec, forecast.convention.get("params", "total")
    n = getattr(spec.params, counted, spec.params.total)
    run = {
        "run": spec.run_id,
        "training compute C": f"{numbers.flops(spec.flops)} FLOPs (asked for {numbers.flops(forecast.target_flops)})",
        f"N, parameters ({counted.replace('_', ' ')})": f"{n:,} (N* {numbers.si(forecast.n_params)})",
        "D, training tokens": f"{spec.tokens:,} (D* {numbers.si(forecast.n_tokens)})",
        "tokens per parameter": f"{spec.tokens / n:.1f}",
        "loss, 50% interval": f"{numbers.interval(forecast.interval_50, 4)} nats per token",
        "loss, 90% interval": f"{numbers.interval(forecast.interval_90, 4)} nats per token",
    }
    shape, optim, schedule = spec.shape, spec.optim, spec.schedule
    recipe = {
        "shape": f"{shape.depth} layers × width {shape.width}, {shape.n_heads} heads of {shape.dim_per_head}, MLP {shape.d_ff}",
        "vocabulary, sequence length": f"{shape.vocab_size:,}, {shape.seq_len:,} tokens",
        "optimizer": f"{optim.name}, peak learning rate {optim.peak_lr:.4g}, weight decay {optim.weight_decay:g}",
        "batch": f"{spec.batch_tokens:,} tokens, {spec.steps:,} steps",
        "schedule": f"{schedule.kind}, warm-up {schedule.warmup_tokens:,} tokens",
        "data, precision, seed": f"{spec.data.name}, {spec.precision}, {spec.seed}",
    }
    if len(forecast.laws) > 1:
        weight: dict[str, float] = {}
        for law in forecast.laws:
            weight[law["name"]] = weight.get(law["name"], 0.0) + law["weight"]
        recipe["laws"] = ", ".join(f"{name} {share:.0%}" for name, share in weight.items())
    return html.pairs("The run", run) + html.pairs("Its recipe", recipe)


def _figures(
    out: Path, fit: FitResult, runs: Runs, forecast: Forecast | None, postmortem: Outcome | None
) -> list[str]:
    """Every figure on the page in both themes; the light one as PNG under out/plots."""
    actual = postmortem.actual if postmortem else None
    metrics = postmortem.metrics if postmortem else ()
    draw: dict[str, tuple[str, Callable[[Theme], Figure]]] = {
        "loss_against_compute": (
            "Every run, the best loss that the law says each budget can buy, and the interval beyond the largest run.",
            lambda theme: plots.loss_against_compute(fit, runs, forecast, actual, theme),
        ),
        "isoflop": (
            "At a fixed budget a small model wants for capacity and a large one for tokens: the minimum is the best size.",
            lambda theme: plots.isoflop_curves(fit, runs, theme),
        ),
        "surface": (
            "The fitted loss over model size and training tokens; the line is the best way to grow.",
            lambda theme: plots.surface(fit, runs, forecast, theme),
        ),
        "residuals": (
            "How far each run lies from the law: a trend here would mean that the law bends.",
            lambda theme: plots.residuals(fit, runs, forecast, actual, theme),
        ),
    }
    if forecast:
        sentence = (
            "The flagship's held-out loss as it trained"
            if actual
            else "The loss curve that the flagship should follow"
        )
        draw = {
            "loss_against_compute": draw.pop("loss_against_compute"),
            "forecast": (
                f"{sentence}, and the intervals forecast before it started.",
                lambda theme: plots.forecast_curve(forecast, metrics, theme),
            ),
            **draw,
        }
    if fit.surface.on_frontier:  # a law of C alone says nothing of N and D apart
        del draw["isoflop"], draw["surface"]
    figures = []
    for name, (caption, plot) in draw.items():
        path = save(plot(LIGHT), out / "plots" / f"{name}.png")
        figures.append(html.picture(path.read_bytes(), png(plot(DARK)), name.replace("_", " "), caption))
    return figures


def _law(fit: FitResult, postmortem: Outcome | None) -> str:
    refit = postmortem.refit if postmortem else None
    header = ["parameter", "value", "95% interval", *(["with the flagship"] if refit else [])]
    rows = []
    for name, value in fit.parameters.items():
        interval = fit.intervals.get(name)
        between = f"{interval[0]:.4g} – {interval[1]:.4g}" if interval is not None else None
        rows.append([name, float(value), between, *([float(refit.parameters[name])] if refit else [])])
    blocks = [html.table(f"{fit.law}, objective {fit.objective:.4g} over {fit.n_runs} runs", header, rows)]
    if postmortem and postmortem.next_target:
        target = postmortem.next_target
        rows = [
            [when, f"{target[f'loss{key}']:.4f}", numbers.interval(target[f"interval_90{key}"], 4)]
            for when, key in (("as it was forecast from", "_before"), ("with the flagship", ""))
        ]
        caption = (
            f"Next: {numbers.flops(target['flops'])} FLOPs, {numbers.si(target['n_params'])} parameters, "
            f"{numbers.si(target['n_tokens'])} tokens"
        )
        blocks.append(html.table(caption, ["law", "loss (nats per token)", "90% interval"], rows))
    return "".join(blocks)


def _evidence(fit: FitResult, runs: Runs, forecast: Forecast | None) -> list[str]:
    blocks = []
    target = forecast.target_flops if forecast else 10 * fit.largest_flops
    at = f"at {numbers.flops(target)} FLOPs"
    header = ["approach", "N* ∝ C^a, a", "D* ∝ C^b, b", f"N* {at}", f"D* {at}"]
    rows = [[APPROACHES[name], *_approach(value, target)] for name, value in fit.approaches.items()]
    blocks += ["<h2>Chinchilla's three approaches</h2>", html.table("", header, rows)]
    blocks += [f'<p class="soft">{html.text(line)}</p>' for line in _silent_approaches(fit)]
    if fit.backtest:
        blocks += ["<h2>Backtest: the largest budgets held out and forecast from the rest</h2>", *_backtest(fit)]
    remarks = list(dict.fromkeys([*fit.warnings, *runs.notes, *(forecast.notes if forecast else [])]))
    if remarks:
        blocks += ["<h2>Warnings and notes</h2>", html.notes(remarks)]
    blocks += ["<h2>Runs</h2>", _runs(fit, runs)]
    return blocks


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


def _provenance(runs: Runs, forecast: Forecast | None, postmortem: Outcome | None) -> list[str]:
    facts: dict[str, object] = {
        "report made by commit": git_commit(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions(*PACKAGES).items()),
        "counting": ", ".join(f"{key} {value}" for key, value in runs.convention.items()),
    }
    commands = []
    plan = runs.plan
    if plan:
        facts |= {"sweep planned": f"{plan.created} by commit {plan.commit}"}
        facts |= {
            "corpus": f"{plan.data.name}, digest {plan.data.digest}, {plan.data.train_tokens:,} training tokens"
        }
        commands.append(" ".join(["python -m scaling.sweep", *plan.overrides]))
    if forecast:
        facts |= {"forecast sealed": forecast.created, "seal (sha256)": forecast.seal}
        budget = f"{forecast.target_flops:g}".replace("e+", "e")
        commands.append(f"python -m analysis.fit --data {runs.source} --budget {budget} --out DIR")
        commands.append("python -m train.flagship forecast=DIR/forecast.json")
    if postmortem:
        commands.append(f"python -m analysis.postmortem {postmortem.run}")
    shown = "\n".join(commands)
    return [html.pairs("", facts), *([f"<pre>{html.text(shown)}</pre>"] if shown else [])]
