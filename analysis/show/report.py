"""One self-contained HTML page: the forecast and what came of it first, then plots, law, evidence and provenance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.decide.allocate import Allocation, allocate, flops_per_token_of
from analysis.decide.forecast import extrapolation_colour
from analysis.decide.limits import NONE, Limits
from analysis.decide.optimum import Search
from analysis.show import decision, html, numbers, plots
from analysis.show.evidence import evidence
from analysis.show.style import darkened, drawn, png, save
from scaling.errors import InputError
from scaling.files import write_text
from scaling.provenance import git_commit, versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.decide.answer import Answer
    from analysis.decide.cluster import ClusterPlan, RecipeAdvice
    from analysis.inference import FitResult
    from analysis.runs import Runs
    from scaling.cost import Cost
    from scaling.records import Forecast

DEFAULT_RATIO = 10.0
"""Budget over the largest run's compute where nothing else is asked."""
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
    out: Path,
    fit: FitResult,
    runs: Runs,
    forecast: Forecast | None = None,
    postmortem: Outcome | None = None,
    said: Answer | None = None,
) -> Path:
    """Write out/report.html and out/plots/*.png, each atomically.

    Args:
        out: the folder; made when missing.
        fit: the law, as fitted before the flagship ran.
        runs: the runs it was fitted on.
        forecast: the sealed forecast, when one was made.
        postmortem: what came of it, when the flagship has run.
        said: what the fit answered; its first budget, limits, cost and plan are shown.
    Returns:
        The page's path.
    """
    told = _told(fit, runs, forecast, said)
    title = (
        f"Loss forecast at {numbers.flops(forecast.spec.flops)} FLOPs"
        if forecast
        else f"Scaling law of {runs.source}"
    )
    lead = decision.lead(told.best, forecast, told.plan, runs.convention, postmortem is not None)
    if postmortem:
        lead += " " + decision.came(postmortem.summary, postmortem.verdict[0])
    figures = _figures(out, fit, runs, forecast, postmortem, told)
    body = [
        f"<header><h1>{html.text(title)}</h1>",
        *([f'<p class="lead">{html.text(lead)}</p>'] if lead else []),
        f'<p class="soft">{html.text(_subtitle(fit, runs, forecast))}</p></header>',
        f'<div class="cards">{"".join(_headline(fit, runs, forecast, postmortem, told))}</div>',
    ]
    if postmortem and (checked := decision.checked(postmortem.summary)):
        body += ["<h2>What came of it</h2>", checked]
    if told.best is not None:
        how = decision.sureness(told.best, told.limits)
        body += [
            "<h2>What to train, and how sure that is</h2>",
            f'<div class="columns">{figures.pop("allocation")}{how}</div>',
        ]
    if told.plan is not None:
        body += ["<h2>The plan</h2>", f'<div class="columns">{decision.cluster(told.plan)}</div>']
    elif told.cost is not None:
        body += ["<h2>What it costs</h2>", decision.costs(told.cost)]
    if forecast:
        run = decision.run(forecast, _advice(runs, forecast))
        body += ["<h2>What is sealed</h2>", f'<div class="columns">{run}</div>']
    last = figures.pop("residuals")
    body += ["<h2>What the runs say</h2>", f'<div class="columns">{"".join(figures.values())}</div>']
    body += [
        "<h2>The law</h2>",
        f'<div class="columns">{last}<div class="stack">{_law(fit, postmortem)}</div></div>',
    ]
    remarks = [*(said.warnings if said else fit.warnings), *(forecast.notes if forecast else [])]
    body += evidence(fit, runs, told.budget_flops, remarks)
    body += ["<h2>Where this comes from</h2>", *_provenance(runs, forecast, postmortem)]
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    path = out / "report.html"
    write_text(path, html.page(title, css, body))
    return path


@dataclass(frozen=True)
class _Told:
    """What the page says about its budget."""

    budget_flops: float
    best: Allocation | None
    """None where the law has no N* and D*."""
    limits: Limits
    cost: Cost | None
    plan: ClusterPlan | None


def _told(fit: FitResult, runs: Runs, forecast: Forecast | None, said: Answer | None) -> _Told:
    """The answer's first budget; without an answer, the forecast's, or 10× the largest run's."""
    if said is not None:
        best = said.allocations[0] if said.allocations else None
        return _Told(said.budgets[0], best, said.limits, said.costs[0] if said.costs else None, said.plan)
    budget = forecast.target_flops if forecast else DEFAULT_RATIO * fit.largest_flops
    limits, family = Limits(**forecast.limits) if forecast else NONE, runs.plan.family if runs.plan else None
    try:
        best = None if fit.surface.on_frontier else allocate(fit, budget, family, limits)
    except InputError:  # no optimum: the page has its other parts
        best = None
    return _Told(budget, best, limits, None, None)


def _advice(runs: Runs, forecast: Forecast) -> RecipeAdvice | None:
    """How sure the sealed recipe is, where it is the sweep's."""
    if runs.plan is None:
        return None
    from analysis.decide.cluster import Snapped, advise

    spec = forecast.spec
    n, d = decision.counted(forecast), float(spec.tokens)
    point = Snapped(spec.shape, n, d, forecast.loss, forecast.interval_50, forecast.interval_90, 0.0, "")
    return decision.advised(spec, advise(runs, point))


def _subtitle(fit: FitResult, runs: Runs, forecast: Forecast | None) -> str:
    laws = dict.fromkeys(m.member.law for m in fit.ensemble.members)
    what = f"{len(laws)} laws weighed by backtest" if len(laws) > 1 else f"{fit.law} law"
    largest = numbers.flops(fit.largest_flops)
    text = f"{what}, fitted on {fit.n_runs} runs of {runs.source}, the largest {largest} FLOPs"
    return f"{text}; sealed {forecast.created}" if forecast else text


def _headline(
    fit: FitResult, runs: Runs, forecast: Forecast | None, postmortem: Outcome | None, told: _Told
) -> list[str]:
    ratio = forecast.extrapolation_ratio if forecast else fit.extrapolation_ratio(told.budget_flops)
    colour = extrapolation_colour(ratio)
    reach = html.card(
        "Extrapolation", f"{ratio:.3g}×", under=f"{colour}: over the largest run's compute", colour=colour
    )
    more = [reach]
    if told.plan is not None:
        c = told.plan.cost
        low, high = c.ranges["cost_usd"]
        between = f"{numbers.si(low, 2)} – {numbers.si(high, 2)} USD; {decision.figure(c.days)} days"
        more.append(html.card("Rent", numbers.si(c.cost_usd, 3), "USD", between))
    if forecast is None:
        at = f"Forecast at {numbers.flops(told.budget_flops)} FLOPs"
        if told.best is None:
            n, d = plots.frontier(fit, runs.table, np.array([told.budget_flops]))
            low, high = (float(side[0]) for side in fit.predict_interval(n, d, 0.9))
            loss = float(fit.predict(n, d)[0])
            return [html.card(at, f"{loss:.3f}", under=f"90% interval {numbers.interval((low, high))}"), *more]
        best = told.best
        optimum = html.card(
            "Compute-optimal there", numbers.si(best.n_params), "parameters", f"{numbers.si(best.n_tokens)} tokens"
        )
        interval = f"90% interval {numbers.interval(best.interval_90)}"
        return [html.card(at, f"{best.loss:.3f}", under=interval), optimum, *more]
    predicted = html.card(
        "Forecast", f"{forecast.loss:.3f}", "nats per token", f"90% interval {numbers.interval(forecast.interval_90)}"
    )
    if postmortem is None:
        return [predicted, html.card("Actual", "not yet", under="the flagship has not run"), *more]
    sentence, mark = postmortem.verdict
    error = numbers.percent(postmortem.summary["relative_error"])
    return [
        predicted,
        html.card("Actual", f"{postmortem.actual:.3f}", "nats per token", sentence, mark),
        html.card("Forecast error", error, under="forecast over actual, less one"),
        *more,
    ]


def _figures(
    out: Path, fit: FitResult, runs: Runs, forecast: Forecast | None, postmortem: Outcome | None, told: _Told
) -> dict[str, str]:
    """Every figure of the page by name, in both themes; the light one as PNG under out/plots."""
    actual = postmortem.actual if postmortem else None
    metrics = postmortem.metrics if postmortem else ()
    draw: dict[str, tuple[str, Callable[[], Figure]]] = {
        "loss_against_compute": (
            "Every run, the best loss that the law says each budget can buy, and the interval beyond the largest run.",
            lambda: plots.loss_against_compute(fit, runs, forecast, actual, budget_flops=told.budget_flops),
        ),
        "isoflop": (
            "At a fixed budget a small model wants for capacity and a large one for tokens: the minimum is the best size.",
            lambda: plots.isoflop_curves(fit, runs),
        ),
        "surface": (
            "The fitted loss over model size and training tokens; the line is the best way to grow.",
            lambda: plots.surface(fit, runs, forecast),
        ),
        "residuals": (
            "How far each run lies from the law: a trend here would mean that the law bends.",
            lambda: plots.residuals(fit, runs, forecast, actual),
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
                lambda: plots.forecast_curve(forecast, metrics),
            ),
            **draw,
        }
    if fit.surface.on_frontier:  # a law of C alone says nothing of N and D apart
        del draw["isoflop"], draw["surface"]
    if told.best is not None:
        draw["allocation"] = (
            "The whole budget spent at every size: the floor is flat, so that a size near N* costs next to nothing.",
            _valley(fit, runs, forecast, told, told.best),
        )
    figures = {}
    for name, (caption, plot) in draw.items():
        image = drawn(plot())
        light, dark = png(image), png(darkened(image, has_areas=name == "surface"))
        save(light, out / "plots" / f"{name}.png")
        figures[name] = html.picture(light, dark, name.replace("_", " "), caption)
    return figures


def _valley(
    fit: FitResult, runs: Runs, forecast: Forecast | None, told: _Told, best: Allocation
) -> Callable[[], Figure]:
    """The figure of the budget's valley, with the plan's shape, or else the forecast's."""
    search = Search(fit, flops_per_token_of(fit, runs.plan.family if runs.plan else None), told.limits)
    chosen = None
    if told.plan is not None:
        chosen = told.plan.snapped.n_params, told.plan.snapped.loss
    elif forecast is not None:
        chosen = decision.counted(forecast), forecast.loss
    return lambda: plots.allocation(search, best, runs.convention, chosen)


def _law(fit: FitResult, postmortem: Outcome | None) -> str:
    refit = postmortem.refit if postmortem else None
    header = ["parameter", "value", "95% interval", *(["with the flagship"] if refit else [])]
    rows = []
    for name, value in fit.parameters.items():
        interval = fit.intervals.get(name)
        between = f"{interval[0]:.4g} – {interval[1]:.4g}" if interval is not None else None
        if name in dict(fit.surface.fixed):
            between = "held"
        rows.append([name, float(value), between, *([float(refit.parameters[name])] if refit else [])])
    blocks = [html.table(f"{fit.law}, objective {fit.objective:.4g} over {fit.n_runs} runs", header, rows)]
    weight: dict[str, float] = {}
    for m in fit.ensemble.members:
        weight[m.member.law] = weight.get(m.member.law, 0.0) + m.weight
    seeds = "no replicates" if fit.seed_noise is None else f"{fit.seed_noise:.2%}"
    holds = {
        "form": fit.surface.formula,
        "what forecasts": ", ".join(
            f"{name} {weight[name]:.0%}" for name in sorted(weight, key=lambda k: -weight[k])
        ),
        "run noise": f"{fit.run_noise:.2%} of loss (seeds: {seeds})",
        "law-form error": f"{fit.form.per_efold:.2%} per e-fold of compute beyond the largest run",
        "solver": f"{fit.starts_agreeing} of {fit.starts} starts agree, condition {fit.condition:.2g}",
    }
    blocks.append(html.pairs("How well it holds", holds))
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
        facts |= {"fitted on": f"{len(forecast.run_ids)} runs, by id in the sealed file, of {forecast.sweep}"}
        facts |= {"forecast sealed": forecast.created, "seal (sha256)": forecast.seal}
        budget = f"{forecast.target_flops:g}".replace("e+", "e")
        commands.append(f"python -m analysis.fit --data {runs.source} --budget {budget} --out DIR")
        commands.append("python -m train.flagship forecast=DIR/forecast.json")
    if postmortem:
        commands.append(f"python -m analysis.postmortem {postmortem.run}")
    shown = "\n".join(commands)
    return [html.pairs("", facts), *([f"<pre>{html.text(shown)}</pre>"] if shown else [])]
