"""The part of a report that is decided on: how large, how long, on what, for how much, how sure, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from analysis.decide.allocate import Allocation
from analysis.decide.limits import Limits
from analysis.show import html, numbers
from scaling.accounting import count_params
from scaling.derivation import summary
from scaling.spec import RunSpec
from scaling.text import readable_time

if TYPE_CHECKING:  # the layout planner, of which only a plan asks
    from analysis.decide.cluster import ClusterPlan, RecipeAdvice
    from scaling.cost import Cost
    from scaling.records import Forecast
    from scaling.shape import ModelShape

COSTS = {
    "GPU-hours": "gpu_hours",
    "days": "days",
    "rent (USD)": "cost_usd",
    "energy (MWh)": "energy_mwh",
    "CO2e (t)": "co2e_t",
}


def lead(
    best: Allocation | None,
    forecast: Forecast | None,
    plan: ClusterPlan | None,
    convention: Mapping[str, str],
    ran: bool = False,
) -> str:
    """The page's first sentence: what to train, what loss it will have, how sure that is, and what it takes.

    Empty for a law of compute alone, which says nothing of N and D.

    Args:
        ran: whether the flagship has.
    """
    if plan is not None:
        at, c = plan.snapped, plan.cost.flops
        n, d, loss, interval = at.n_params, at.n_tokens, at.loss, at.interval_90
    elif forecast is not None:
        spec, c = forecast.spec, float(forecast.spec.flops)
        n, d, loss, interval = counted(forecast), float(spec.tokens), forecast.loss, forecast.interval_90
    elif best is not None:
        n, d, loss, interval, c = best.n_params, best.n_tokens, best.loss, best.interval_90, best.train_flops
    else:
        return ""
    unit = " nats per token" if convention.get("loss") == "nats_per_token" else ""
    will = "were forecast to reach" if ran else "will reach"
    text = (
        f"{numbers.si(n)} parameters trained on {numbers.si(d)} tokens, {numbers.flops(c)} FLOPs, {will} a held-out loss "
        f"of {loss:.3f}{unit}: {interval[0]:.3f} to {interval[1]:.3f} with 90% probability"
    )
    if plan is None:
        return text + "."
    cost, layout = plan.cost, plan.layout
    return (
        f"{text}. It takes {figure(cost.days)} days of {layout.layout.devices:,} × {layout.device.name} and "
        f"{numbers.si(cost.cost_usd, 2)} USD of rent."
    )


def came(outcome: Mapping[str, Any], verdict: str) -> str:
    """The sentence after it, once the flagship has run."""
    error = outcome["relative_error"]
    side = "high" if error > 0 else "low"
    return f"It came to {outcome['actual_loss']:.3f}: the forecast was {abs(error):.2%} too {side}, and the loss fell {verdict}."


def counted(forecast: Forecast) -> float:
    """N of the forecast's shape as the runs are counted."""
    params = forecast.spec.params
    return float(getattr(params, forecast.convention.get("params", "total"), params.total))


def sureness(best: Allocation, limits: Limits) -> str:
    """Best point, interval, flat region and what a wrong choice costs."""

    def ends(pair: tuple[float | None, float | None]) -> str:
        return " – ".join("open" if end is None else numbers.si(end, 2) for end in pair)

    sure = best.sureness
    rows: dict[str, object] = {
        "N*, D*": f"{numbers.si(best.n_params)} parameters, {numbers.si(best.n_tokens)} tokens "
        f"({best.n_tokens / best.n_params:.3g} a parameter)",
        "90% interval of N*": ends(sure.n_interval),
        "90% interval of D*": ends(sure.d_interval),
        "within 0.1% of the least loss": f"every N of {ends(sure.flat)}: take the one that is cheapest to serve",
        "loss given up if N* is wrong": f"{100 * sure.regret[0]:.2g}% if the exponents sit at its interval's low end, "
        f"{100 * sure.regret[1]:.2g}% at its high end",
        "batch, B_opt – B_crit": f"{ends(best.batch_tokens)} tokens a step (Bergsma et al. 2025)",
    }
    if best.held is not None:
        rows["with all experts, met by a token"] = " and ".join(f"{numbers.si(n)} parameters" for n in best.held)
    if best.unlimited is not None:
        n, d, loss = best.unlimited
        rows["limits"] = str(limits)
        rows["without them"] = (
            f"{numbers.si(n)} on {numbers.si(d)}, loss {loss:.3f}: they give up {numbers.percent(best.loss / loss - 1)}"
        )
        rows["training takes"] = f"{numbers.flops(best.train_flops)} FLOPs of the budget"
    if best.epochs is not None:
        rows["epochs"] = (
            f"{best.epochs:.3g} of the unique tokens; what a repeated one is worth is {limits.repetition}"
        )
    return html.pairs(f"How large, and how sure, at {numbers.flops(best.budget_flops)} FLOPs", rows)


def run(forecast: Forecast, advice: RecipeAdvice | None) -> str:
    """The sealed run and its recipe, with how sure the recipe is."""
    spec, name = forecast.spec, forecast.convention.get("params", "total").replace("_", " ")
    n, optim, schedule = counted(forecast), spec.optim, spec.schedule
    rows: dict[str, object] = {
        "run": spec.run_id,
        "training compute C": f"{numbers.flops(spec.flops)} FLOPs (asked for {numbers.flops(forecast.target_flops)})",
        f"N, parameters ({name})": f"{round(n):,} (N* {numbers.si(forecast.n_params)})",
        "D, training tokens": f"{spec.tokens:,} (D* {numbers.si(forecast.n_tokens)})",
        "tokens per parameter": f"{spec.tokens / n:.1f}",
        "loss": f"{forecast.loss:.4f} nats per token",
        "50% interval": numbers.interval(forecast.interval_50, 4),
        "90% interval": numbers.interval(forecast.interval_90, 4),
        **({"limits that it keeps": str(Limits(**forecast.limits))} if forecast.limits else {}),
    }
    recipe: dict[str, object] = {
        **_shape(spec.shape),
        "optimizer": f"{optim.name}, peak learning rate {optim.peak_lr:.4g}, weight decay {optim.weight_decay:g}",
        **(_how_sure(advice) if advice is not None else {}),
        "batch": f"{spec.batch_tokens:,} tokens, {spec.steps:,} steps",
        "schedule": f"{schedule.kind}, warm-up {schedule.warmup_tokens:,} tokens",
        "data, precision, seed": f"{spec.data.name}, {spec.precision}, {spec.seed}",
    }
    return html.pairs("The run", rows) + html.pairs("Its shape and recipe", recipe)


def advised(spec: RunSpec, advice: RecipeAdvice) -> RecipeAdvice | None:
    """The advice where it is about the recipe that the run has; None where the two peak learning rates differ."""
    return advice if abs(advice.values.peak_lr / spec.optim.peak_lr - 1) < 0.01 else None


def _how_sure(advice: RecipeAdvice) -> dict[str, object]:
    low, high = advice.lr_interval
    return {
        "learning rate's interval": f"{low:.2g} – {high:.2g} ({advice.lr_interval_of})",
        "recipe": advice.verified,
    }


def _shape(shape: ModelShape) -> dict[str, object]:
    kv = f" ({shape.n_kv_heads} key/value)" if shape.n_kv_heads else ""
    return {
        "shape": f"{shape.depth} layers × width {shape.width}, {shape.n_heads} heads{kv} of {shape.dim_per_head}, MLP {shape.d_ff}",
        "vocabulary, sequence length": f"{shape.vocab_size:,}, {shape.seq_len:,} tokens",
    }


def cluster(plan: ClusterPlan) -> str:
    """Shape and recipe on devices, their layout, and what it costs."""
    snapped, values, layout = plan.snapped, plan.recipe.values, plan.layout
    shape: dict[str, object] = {
        **_shape(snapped.shape),
        "parameters": f"{numbers.si(count_params(snapped.shape).total)} ({numbers.si(snapped.n_params)} as the runs are counted)",
        "tokens": numbers.si(snapped.n_tokens),
        "width / depth": f"near {snapped.aspect_source}",
        "loss": f"{snapped.loss:.4f}; {numbers.percent(snapped.given_up, 3)} against N*",
        "50%, 90% interval": f"{numbers.interval(snapped.interval_50)}, {numbers.interval(snapped.interval_90)}",
        "peak learning rate": f"{values.peak_lr:.2e}",
        **_how_sure(plan.recipe),
        "batch, warm-up": f"{numbers.si(values.batch_tokens)} tokens a step, {numbers.si(values.warmup_tokens)} tokens",
        "weight decay, schedule": f"{values.weight_decay:g}, {plan.recipe.schedule}",
    }
    if values.note:
        shape["note"] = values.note
    on = f"{layout.layout.devices:,} × {layout.device.name}"
    lines = (line.partition(" ") for line in summary(layout))
    how: dict[str, object] = {name: said.strip() for name, _, said in lines}
    return html.pairs(f"The shape for {on}", shape) + (
        f'<div class="stack">{html.pairs("The layout that is fastest by the model of steps", how)}{costs(plan.cost)}</div>'
    )


def costs(cost: Cost) -> str:
    """What training takes, with the range of what is not known."""
    rows = [
        [name, figure(getattr(cost, key)), " – ".join(map(figure, cost.ranges[key]))] for name, key in COSTS.items()
    ]
    caption = f"What {numbers.flops(cost.flops)} FLOPs cost at {cost.tflops_per_device:.3g} TFLOP/s a device ({cost.mfu:.0%} of the peak)"
    return html.table(caption, ["", "figure", "range"], rows)


def figure(value: float) -> str:
    """A cost: whole where it has three or four digits, else to three."""
    return f"{value:,.0f}" if 100 <= value < 1e4 else numbers.si(value)


def checked(summary: Mapping[str, Any]) -> str:
    """The flagship's curve, time and money against what was forecast, and what moved: fields of postmortem.json."""
    rows: dict[str, object] = {}
    if curve := summary.get("curve"):
        rows["loss curve"] = (
            f"{curve['points']} evaluations, mean error {curve['mean_abs_error']:.2%}; {curve['inside_50']:.0%} inside the 50% "
            f"band, {curve['inside_90']:.0%} inside the 90% band"
        )
    if spent := summary.get("spent"):
        rows["time"] = (
            f"{readable_time(spent['actual_s'])}, {readable_time(spent['planned_s'])} planned ({spent['ratio']:.2f}×)"
        )
        rows["rent"] = f"{spent['actual_usd']:.2g} USD, {spent['planned_usd']:.2g} planned"
        rows["speed"] = f"{spent['tokens_per_s']:,.0f} tokens/s"
    for assumption in summary.get("assumptions", [])[:4]:
        moved = ": moved" if assumption["moved"] else ""
        rows[assumption["name"]] = (
            f"{numbers.percent(assumption['deviation'], 1)} against the forecast, z {assumption['z']:+.1f}{moved}"
        )
    return html.pairs("", rows) if rows else ""
