"""The plan of a budget, for a terminal: shape, recipe, cluster, days and money."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.decide.allocate import Allocation
from analysis.decide.cluster import ClusterPlan
from analysis.decide.experts import ExpertsChoice
from analysis.show.numbers import flops, interval, percent, si
from scaling.accounting import count_params
from scaling.cost import Cost
from scaling.derivation import summary


def cost_lines(costs: Sequence[Cost], allocations: Sequence[Allocation]) -> list[str]:
    """GPU-hours and rent of each budget's training."""
    return [
        f"training at {flops(a.budget_flops)}: {si(c.gpu_hours)} GPU-hours at {c.tflops_per_device:.3g} TFLOP/s "
        f"({c.mfu:.0%} of the peak), {c.cost_usd:,.0f} USD"
        for c, a in zip(costs, allocations, strict=True)
    ]


def experts_lines(choice: ExpertsChoice) -> list[str]:
    """Every number of experts at one budget, and which is best."""
    lines = [
        f"how many experts, at {flops(choice.budget_flops)} and the runs' {choice.tokens_per_param:.3g} tokens for a parameter that a "
        "token meets"
    ]
    for c in choice.candidates:
        remarks = [] if c.fits else ["does not fit"]
        remarks += [] if c.measured else ["not in the runs' range"]
        lines.append(
            f"  {c.experts:>4}  {si(c.n_active)} met, {si(c.n_total)} in all, {si(c.n_tokens)} tokens  loss {c.loss:.4f}"
            + (f"  ({', '.join(remarks)})" if remarks else "")
        )
    if choice.best is None:
        return [*lines, "  none of them fits: raise the bound or ask about fewer"]
    said = f"  best: {choice.best}, in {choice.share:.0%} of the resamples too"
    return [*lines, f"{said}; fewer parameters on more tokens than that ratio: the law does not say"]


def plan_lines(plan: ClusterPlan) -> list[str]:
    """The whole plan of the first budget."""
    snapped, recipe, cost = plan.snapped, plan.recipe, plan.cost
    shape, values, layout = snapped.shape, recipe.values, plan.layout
    ranges = cost.ranges
    kv = f" ({shape.n_kv_heads} key/value)" if shape.n_kv_heads else ""
    rows = [
        ("shape", f"width {shape.width}, depth {shape.depth}, {shape.n_heads} heads{kv} of {shape.dim_per_head}, "
         f"feed-forward {shape.d_ff}, vocabulary {shape.vocab_size:,}, sequences of {shape.seq_len:,}"),
        ("", f"{si(count_params(shape).total)} parameters ({si(snapped.n_params)} as the runs are counted) on "
         f"{si(snapped.n_tokens)} tokens; width / depth near {snapped.aspect_source}"),
        ("loss", f"{snapped.loss:.4f}, 50% {interval(snapped.interval_50)}, 90% {interval(snapped.interval_90)}; "
         f"{percent(snapped.given_up, 3)} against N*"),
        ("recipe", f"peak LR {values.peak_lr:.2e} ({recipe.lr_interval[0]:.1e} – {recipe.lr_interval[1]:.1e}, "
         f"{recipe.lr_interval_of}), {si(values.batch_tokens)} tokens a step, warm-up {si(values.warmup_tokens)}, "
         f"weight decay {values.weight_decay:g}, {recipe.schedule}"),
        ("", recipe.verified + (f"; {values.note}" if values.note else "")),
    ]  # fmt: skip
    lines = [f"the plan on {layout.layout.devices:,} × {layout.device.name}"]
    lines += [f"  {name:<11} {text}" for name, text in rows]
    lines += [f"  {line}" for line in summary(layout)]
    for name, label in (("gpu_hours", "GPU-hours"), ("days", "days"), ("cost_usd", "USD"), ("co2e_t", "t CO2e")):
        low, high = ranges[name]
        lines.append(f"  {label:<11} {_figure(getattr(cost, name))}   {_figure(low)} to {_figure(high)}")
    return lines


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
