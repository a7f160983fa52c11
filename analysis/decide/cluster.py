"""A shape that exists for N*, its recipe, and the cluster that trains it: what a budget comes to on devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis.decide.allocate import Allocation, flops_per_token_of, predict_with_intervals
from analysis.decide.limits import NONE, Limits
from analysis.decide.optimum import Search
from analysis.inference import FitResult
from analysis.runs import Runs
from scaling.accounting import PARAMS_CONVENTIONS, count_params, flops_per_token
from scaling.cost import Cost, divisible_batch, plan_cost
from scaling.errors import InputError
from scaling.files import read_json
from scaling.goodput import goodput
from scaling.hardware import Device
from scaling.layout import Plan, plan
from scaling.recipe import PUBLISHED as PUBLISHED_RULES
from scaling.recipe import Hyperparameters, Recipe, recipe_from_dict
from scaling.shape import ModelShape, ShapeFamily

TILE = 128
"""Widths, heads and feed-forward sizes are multiples of it: a matmul's output tiles are 128 or 256 wide (NVIDIA, matrix
multiplication background user's guide), and FlashAttention is fastest at heads of 128."""
KV_HEADS = 8
"""One a device of a server, so that tensor parallelism divides them (Llama 3)."""
ASPECT = 128.0
"""width / depth where the sweep has one depth: 102 to 130 in Llama 3 (arXiv 2407.21783, table 3)."""
_STRETCH = 1.5
"""width / depth within this factor of the aspect ratio: Kaplan et al. 2020 (arXiv 2001.08361, figure 5) lose under 1% there."""
_FF_RATIO, _VOCAB, _SEQ_LEN = 3.5, 128256, 8192
"""Llama 3's, where runs from a file say nothing."""


@dataclass(frozen=True)
class Snapped:
    """A shape near N*, and the D that the budget leaves it."""

    shape: ModelShape
    n_params: float
    """In the fit's convention."""
    n_tokens: float
    loss: float
    interval_50: tuple[float, float]
    interval_90: tuple[float, float]
    given_up: float
    """Relative loss above the best point's."""
    aspect_source: str


@dataclass(frozen=True)
class RecipeAdvice:
    """Hyperparameters with how sure they are."""

    values: Hyperparameters
    lr_interval: tuple[float, float]
    lr_interval_of: str
    verified: str
    schedule: str


@dataclass(frozen=True)
class ClusterPlan:
    """The whole plan of a budget."""

    snapped: Snapped
    recipe: RecipeAdvice
    layout: Plan
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        running = goodput(self.layout.layout.devices, self.layout.checkpoint_bytes)
        return {
            **asdict(self.snapped),
            "params_total": count_params(self.snapped.shape).total,
            "recipe": {**asdict(self.recipe.values), "peak_lr_interval": list(self.recipe.lr_interval)},
            "recipe_verified": self.recipe.verified,
            "device": self.layout.device.name,
            "devices": self.layout.layout.devices,
            "layout": vars(self.layout.layout),
            "batch_tokens": self.layout.batch * self.layout.shape.seq_len,
            "step_time_s": self.layout.step.total,
            "memory_gb": self.layout.memory.total / 1e9,
            "mfu_range": list(self.layout.mfu_range),
            "goodput": running.share,
            **{name: value for name, value in vars(self.cost).items() if name != "ranges"},
            "ranges": {name: list(span) for name, span in self.cost.ranges.items()},
        }


def make_plan(
    fit: FitResult, runs: Runs, best: Allocation, device: Device, devices: int, limits: Limits = NONE
) -> ClusterPlan:
    """Snap the best point to a shape, and lay it out on `devices` devices.

    Raises:
        InputError: N* below the smallest shape of tiles; a cluster that cannot hold or divide it.
    """
    snapped = snap(fit, runs, best, limits)
    advice = advise(runs, snapped)
    sequences = divisible_batch(advice.values.batch_tokens / snapped.shape.seq_len, devices)
    chosen = plan(snapped.shape, device, devices, sequences)
    batch_tokens = sequences * snapped.shape.seq_len
    tokens = max(round(snapped.n_tokens / batch_tokens), 1) * batch_tokens
    values = replace(advice.values, batch_tokens=batch_tokens)
    return ClusterPlan(snapped, replace(advice, values=values), chosen, plan_cost(chosen, tokens))


def tiled_shape(width: int, depth: int, family: ShapeFamily | None) -> ModelShape:
    """A shape of heads of 128 whose sizes are multiples of TILE; vocabulary, sequence and MLP ratio are the family's."""
    ratio = _FF_RATIO if family is None else family.ff_ratio
    heads = width // TILE
    return ModelShape(
        width=width,
        depth=depth,
        n_heads=heads,
        n_kv_heads=KV_HEADS if heads % KV_HEADS == 0 else None,
        d_ff=max(1, round(ratio * width / (2 * TILE))) * 2 * TILE,
        vocab_size=_VOCAB if family is None else family.vocab_size,
        seq_len=_SEQ_LEN if family is None else family.seq_len,
        tied_embeddings=family is not None and family.tied_embeddings,
        qk_norm=family is None or family.qk_norm,
        experts=None if family is None else family.experts,
    )


def aspect_ratio(runs: Runs) -> tuple[float, str]:
    """width / depth to aim at, and where it is from."""
    family = runs.plan.family if runs.plan is not None else None
    if family is not None and family.aspect_ratio is not None:
        return family.aspect_ratio, "the sweep's model family"
    if {"width", "depth"} <= set(runs.table) and runs.table["depth"].nunique() > 1:
        largest = runs.table[runs.table["flops"] > 0.5 * runs.table["flops"].max()]
        best = largest.loc[largest["loss"].idxmin()]
        return float(best["width"] / best["depth"]), "the best of the sweep's largest runs"
    return ASPECT, "as in Llama 3, since the runs do not vary it"


def snap(fit: FitResult, runs: Runs, best: Allocation, limits: Limits = NONE) -> Snapped:
    """The tiled shape nearest to N*, and the D that the budget leaves it by its own exact FLOPs.

    Raises:
        InputError: N* below the smallest shape of tiles, or N counted in a way that shapes are not.
    """
    family = runs.plan.family if runs.plan is not None else None
    convention = fit.convention["params"]
    params = convention if convention in PARAMS_CONVENTIONS else "total"
    aspect, source = aspect_ratio(runs)
    found: tuple[float, ModelShape] | None = None
    for width in range(TILE, 65 * 1024, TILE):
        if (width > 16 * TILE and width % (4 * TILE)) or (width > 32 * TILE and width % (8 * TILE)):
            continue
        one, two = (count_params(tiled_shape(width, k, family)).count(params) for k in (1, 2))
        near = round(1 + (best.n_params - one) / (two - one))
        for depth in {near, near // 2 * 2, (near + 1) // 2 * 2}:
            stretch = math.log(width / max(depth, 1) / aspect)
            if depth < 1 or abs(stretch) > math.log(_STRETCH):
                continue
            shape = tiled_shape(width, depth, family)
            n = count_params(shape).count(params)
            if limits.max_params is not None and n > limits.max_params * 1.001:
                continue
            off = abs(math.log(n / best.n_params)) + 0.05 * abs(stretch) + 0.01 * (depth % 2)
            if found is None or off < found[0]:
                found = off, shape
    if found is None or found[0] > math.log(2):
        raise InputError(
            f"N* = {best.n_params:.3g} is too small for a cluster: the smallest shape of {TILE}-wide tiles near it has "
            f"{count_params(tiled_shape(TILE, 1, family)).count(params):.3g} parameters; leave out --devices, or give a larger budget"
        )
    shape = found[1]
    n_params = float(count_params(shape).count(params))
    train = 6 * n_params if fit.convention["flops"] == "6nd" or family is None else _flops(shape, fit)
    search = Search(fit, flops_per_token_of(fit, family), limits)
    d = float(search.tokens(np.array([n_params]), best.budget_flops, np.array([train]))[0])
    if limits.ratio_flag:
        d = best.train_flops / train
    loss, (inner, outer) = predict_with_intervals(
        fit, *(float(x) for x in search.worth(np.array(n_params), np.array(d)))
    )
    return Snapped(shape, n_params, d, loss, inner, outer, loss / best.loss - 1, f"{aspect:.3g}, {source}")


def _flops(shape: ModelShape, fit: FitResult) -> float:
    return flops_per_token(shape, fit.convention["flops"] != "full_attention").train


def advise(runs: Runs, snapped: Snapped) -> RecipeAdvice:
    """The sweep's recipe at the target, or Step Law's for runs from a file."""
    recipe = Recipe("steplaw") if runs.plan is None else recipe_from_dict(runs.plan.recipe)
    count, d = count_params(snapped.shape), snapped.n_tokens
    flops = flops_per_token(snapped.shape).train * d
    values = recipe.hyperparameters(count, d, flops, snapped.shape)
    kinds = {spec.schedule.kind for spec in runs.plan.runs} if runs.plan is not None else {"wsd"}
    report = _measured_report(recipe)
    n = count.count(recipe.rule.params)
    if report is not None and recipe.rule.n_range is not None:
        low, high = report["peak_lr"]["n_exponent_interval_95"]
        spread = abs(high - low) / 2 * abs(math.log(n / math.sqrt(math.prod(recipe.rule.n_range))))
        interval = (values.peak_lr * math.exp(-spread), values.peak_lr * math.exp(spread))
        of, verified = "95%, by the exponent of N", _verification(report)
    else:
        rates = [rule.peak_lr(count.count(rule.params), d, flops) for rule in PUBLISHED_RULES.values()]
        interval, of = (min(*rates, values.peak_lr), max(*rates, values.peak_lr)), "what published rules say"
        verified = (
            "no sweep of yours verified it: train +grid=lr and one size more (python -m analysis.recipe --verify)"
        )
        if recipe.name == "measured":
            verified = "the sweep that measured it is no longer at its path, or was fitted again"
    return RecipeAdvice(values, interval, of, verified, " or ".join(sorted(kinds)))


def _measured_report(recipe: Recipe) -> Mapping[str, Any] | None:
    """What analysis.recipe wrote beside the law in use; None for another rule, or a file that has another law now."""
    if recipe.name != "measured" or recipe.path is None or recipe.law is None:
        return None
    path = Path(__file__).resolve().parents[2] / recipe.path
    if not path.exists():
        return None
    report = read_json(path, "measured recipe")
    same = math.isclose(report["peak_lr"]["coefficient"], recipe.law.peak_lr.coefficient, rel_tol=1e-9)
    return report if same and "n_exponent_interval_95" in report["peak_lr"] else None


def _verification(report: Mapping[str, Any]) -> str:
    """Whether a size that was not fitted confirmed the law."""
    checks = report.get("verified") or report.get("one_size_out") or []
    if not checks:
        return "fitted, but not tried on a size that was left out"
    worst = max(check["regret"] for check in checks)
    return f"tried one size out: loss given up at most {100 * worst:.2g}%"
