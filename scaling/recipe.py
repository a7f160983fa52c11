"""Recipes: learning rate, batch and warm-up as functions of model size, tokens and compute.

Every published rule here is a power law, so a rule is two `PowerLaw`s and the convention in which it counts N.
They disagree (Step Law raises the learning rate with D, others lower it): a recipe is a choice to be verified by a
sweep, which is what the `measured` rule is for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scaling.accounting import ParamCount, ParamsConvention
from scaling.config import from_dict, to_dict
from scaling.errors import InputError
from scaling.files import read_json
from scaling.shape import ModelShape, ShapeFamily
from scaling.spec import BatchStage
from scaling.transfer import Transfer

RuleName = Literal["steplaw", "porian", "deepseek", "measured", "fixed"]


@dataclass(frozen=True)
class PowerLaw:
    """coefficient · N^n_exponent · D^d_exponent · C^c_exponent, with D in tokens and C in FLOPs."""

    coefficient: float
    n_exponent: float = 0.0
    d_exponent: float = 0.0
    c_exponent: float = 0.0

    def __post_init__(self) -> None:
        if not (self.coefficient > 0 and math.isfinite(self.coefficient)):
            raise InputError(f"coefficient = {self.coefficient}: must be positive")

    def __call__(self, n: float, d: float, c: float) -> float:
        return float(self.coefficient * n**self.n_exponent * d**self.d_exponent * c**self.c_exponent)


@dataclass(frozen=True)
class Rule:
    """How peak learning rate and batch scale."""

    peak_lr: PowerLaw
    batch_tokens: PowerLaw
    """Tokens of one optimizer step."""
    params: ParamsConvention = "body_head"
    """Which parameters N counts."""
    source: str = ""
    n_range: tuple[float, float] | None = None
    """Smallest and largest N that it was measured on."""
    d_range: tuple[float, float] | None = None
    """Fewest and most tokens that it was measured on."""

    def extrapolation(self, n: float, d: float) -> str | None:
        """A sentence when (N, D) lies outside the measured range, else None."""
        outside = [
            f"{label} = {value:.3g} (measured {span[0]:.3g} to {span[1]:.3g})"
            for label, value, span in (("N", n, self.n_range), ("D", d, self.d_range))
            if span is not None and not span[0] * 0.999 <= value <= span[1] * 1.001
        ]
        return f"the recipe extrapolates: {', '.join(outside)}" if outside else None


STEPLAW = Rule(
    peak_lr=PowerLaw(1.79, n_exponent=-0.713, d_exponent=0.307),
    batch_tokens=PowerLaw(0.58, d_exponent=0.571),
    params="non_embedding",
    source="Li et al. 2025, Step Law (arXiv 2503.04715): η = 1.79·N^−.713·D^.307, B = .58·D^.571 tokens",
)
DEEPSEEK = Rule(
    peak_lr=PowerLaw(0.3118, c_exponent=-0.125),
    batch_tokens=PowerLaw(0.2920, c_exponent=0.3271),
    source="DeepSeek LLM 2024 (arXiv 2401.02954): η = .3118·C^−.125, B = .2920·C^.3271 tokens",
)
PORIAN = Rule(
    peak_lr=PowerLaw(3.7, n_exponent=-0.36),
    batch_tokens=PowerLaw(160 * 2048 / 108e6 ** (2 / 3), n_exponent=2 / 3),
    source="Porian et al. 2024 (arXiv 2406.19146): η = 3.7·N^−.36, B = 160·(N/108M)^⅔ sequences of 2048, "
    "warm-up N tokens, β2 .99 below half-million-token batches",
)
PUBLISHED: dict[str, Rule] = {"steplaw": STEPLAW, "deepseek": DEEPSEEK, "porian": PORIAN}


@dataclass(frozen=True)
class Hyperparameters:
    """What a recipe says for one run."""

    peak_lr: float
    batch_tokens: int
    warmup_tokens: int
    weight_decay: float
    beta2: float
    note: str | None = None
    """A warning: the rule was asked outside its measured range."""
    batch_ramp: tuple[BatchStage, ...] = ()
    """Stages before batch_tokens."""


@dataclass(frozen=True)
class Recipe:
    """A rule by name, and the values that are set by hand: what `conf/recipe/*.yaml` and plan.json hold."""

    name: RuleName
    law: Rule | None = None
    """recipe=measured: the law fitted from one's own sweep (read from `path` when a sweep is planned)."""
    path: str | None = None
    """recipe=measured: the JSON file that `python -m analysis.recipe` wrote; relative to the project's root."""
    lr_multiplier: float = 1.0
    """The rule's learning rate times this."""
    batch_multiplier: float = 1.0
    """The rule's batch times this."""
    min_steps: int = 50
    """The batch is made smaller where a run would have fewer optimizer steps than this."""
    warmup_fraction: float = 0.05
    """Warm-up over the run's tokens, where the rule has none of its own."""
    peak_lr: float | None = None
    """Given: wins over the rule (as the four below)."""
    batch_tokens: int | None = None
    warmup_tokens: int | None = None
    weight_decay: float | None = None
    beta2: float | None = None
    batch_ramp: tuple[tuple[float, float], ...] | None = field(default=None, metadata={"absent": None})
    """Stages at the start of a run, each as its share of the run's tokens and its batch over the full one:
    [[.05, .25], [.05, .5]]: a quarter of the batch over the first 5%, half over the next 5%. None: one batch throughout."""
    transfer: Literal["none", "mup", "completep"] = field(default="none", metadata={"absent": "none"})
    """mup, completep: peak_lr, weight decay and initial weights are a base shape's, and scaled from there (scaling.transfer)."""
    base_width: int | None = field(default=None, metadata={"absent": None})
    """With a transfer: the width that peak_lr was tuned at."""
    base_depth: int | None = field(default=None, metadata={"absent": None})
    """With a transfer: its depth; None: the family's at base_width."""

    def __post_init__(self) -> None:
        for name in ("lr_multiplier", "batch_multiplier", "min_steps"):
            if not getattr(self, name) > 0:
                raise InputError(f"recipe.{name} = {getattr(self, name)}: must be positive")
        if not 0 <= self.warmup_fraction < 1:
            raise InputError(f"recipe.warmup_fraction = {self.warmup_fraction}: must be in [0, 1)")
        for name in ("peak_lr", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} = {value}: must be positive")
            if value is None and self.name == "fixed":
                raise InputError(f"recipe=fixed needs recipe.{name}=VALUE")
        for share, batch in self.batch_ramp or ():
            if not (0 < share < 1 and 0 < batch < 1):
                raise InputError(
                    f"recipe.batch_ramp: stage [{share:g}, {batch:g}]: the share of the tokens and that of the batch must be "
                    "between 0 and 1, as in [[0.05, 0.25], [0.05, 0.5]]"
                )
        if self.transfer == "none" and (self.base_width, self.base_depth) != (None, None):
            raise InputError("recipe.base_width and base_depth go with recipe.transfer=mup or completep")
        if self.transfer != "none" and (self.base_width is None or self.peak_lr is None):
            raise InputError(
                f"recipe.transfer={self.transfer} scales a base shape's hyperparameters: give recipe.base_width=WIDTH and "
                "recipe.peak_lr=RATE tuned there, as a rule that scales with N would scale it twice"
            )
        if self.name == "measured" and self.law is None:
            raise InputError(
                "recipe=measured needs its law: give recipe.path=FILE, written by python -m analysis.recipe"
            )

    @property
    def rule(self) -> Rule:
        """The scaling rule; for recipe=fixed one that does not scale."""
        if self.name == "measured":
            assert self.law is not None
            return self.law
        if self.name == "fixed":
            assert self.peak_lr is not None
            assert self.batch_tokens is not None
            return Rule(PowerLaw(self.peak_lr), PowerLaw(self.batch_tokens), source="fixed values")
        return PUBLISHED[self.name]

    def hyperparameters(self, n: ParamCount, tokens: float, flops: float, shape: ModelShape) -> Hyperparameters:
        """The rule at (N, D, C), with the multipliers and then the values given by hand.

        The batch is rounded to whole sequences: at least one, at most what leaves `min_steps` steps.

        Args:
            n: parameters by group; of experts those that a token meets count.
            tokens: D, training tokens.
            flops: C, exact training FLOPs.
            shape: for its seq_len.
        """
        rule, size = self.rule, n.active(self.rule.params)
        at = (size, tokens, flops)
        peak_lr = self.peak_lr or rule.peak_lr(*at) * self.lr_multiplier
        if self.batch_tokens is not None:
            batch = self.batch_tokens
        else:
            sequences = rule.batch_tokens(*at) * self.batch_multiplier / shape.seq_len
            batch = max(1, min(round(sequences), int(tokens / self.min_steps / shape.seq_len))) * shape.seq_len
        warmup: float = self.warmup_fraction * tokens
        beta2 = 0.95
        if self.name == "porian":
            warmup = min(size, tokens / 4)  # the rule's N, but short runs keep most of theirs at the peak
            beta2 = 0.99 if batch < 500_000 else 0.95
        return Hyperparameters(
            peak_lr=peak_lr,
            batch_tokens=batch,
            warmup_tokens=round(warmup) if self.warmup_tokens is None else self.warmup_tokens,
            weight_decay=0.1 if self.weight_decay is None else self.weight_decay,
            beta2=beta2 if self.beta2 is None else self.beta2,
            note=rule.extrapolation(size, tokens),
            batch_ramp=self._stages(tokens, batch, shape.seq_len),
        )

    def transfer_from(self, family: ShapeFamily) -> Transfer | None:
        """The transfer from the base shape; None: there is none.

        Raises:
            InputError: completep in a family of one depth, without the depth that the base has.
        """
        if self.transfer == "none":
            return None
        assert self.base_width is not None, "checked when it was made"
        if self.transfer == "completep" and self.base_depth is None and family.depth is not None:
            raise InputError(
                "recipe.transfer=completep: model.depth says this run's depth: give recipe.base_depth=DEPTH"
            )
        base = family.shape(self.base_width)
        return Transfer(self.transfer, base.width, self.base_depth or base.depth, base.dim_per_head)

    def _stages(self, tokens: float, batch_tokens: int, seq_len: int) -> tuple[BatchStage, ...]:
        """batch_ramp in tokens: whole sequences and whole steps, at least one of each."""
        stages = []
        for share, of_batch in self.batch_ramp or ():
            batch = max(1, round(of_batch * batch_tokens / seq_len)) * seq_len
            stages.append(BatchStage(max(1, round(share * tokens / batch)) * batch, batch))
        return tuple(stages)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `recipe_from_dict` is the inverse."""
        out: dict[str, Any] = to_dict(self)
        return out


def read_law(path: Path) -> Rule:
    """Read a measured law: {"peak_lr": {"coefficient","n_exponent","d_exponent"}, "batch_tokens": {…}, "params",
    "source", "n_range", "d_range"}; other keys (intervals, checks) are the writer's own and left out.

    Raises:
        InputError: missing, not JSON, or not such an object.
    """
    data = read_json(path, "measured recipe (python -m analysis.recipe SWEEP writes one)")
    if not isinstance(data, Mapping):
        raise InputError(f"measured recipe {path}: expected an object, got {data!r:.60}")
    known = {key: data[key] for key in ("params", "source", "n_range", "d_range") if data.get(key) is not None}
    for name in ("peak_lr", "batch_tokens"):
        law = data.get(name)
        if not isinstance(law, Mapping):
            raise InputError(
                f"measured recipe {path} has no {name} law: write it again with python -m analysis.recipe"
            )
        fields = PowerLaw.__dataclass_fields__
        known[name] = from_dict(PowerLaw, {k: v for k, v in law.items() if k in fields}, f"{path.name}: {name}")
    return from_dict(Rule, known, path.name)


def recipe_from_dict(data: Mapping[str, Any], root: Path | None = None) -> Recipe:
    """A recipe from its plain dictionary: Hydra's `recipe` node, or `Plan.recipe`.

    Args:
        data: the fields of Recipe.
        root: what `path` is relative to; the project's root when None.
    Raises:
        InputError: unknown or wrong fields, or a measured law that cannot be read.
    """
    fields = dict(data)
    if fields.get("name") == "measured" and fields.get("law") is None and fields.get("path"):
        fields["law"] = read_law((root or Path(__file__).resolve().parents[1]) / str(fields["path"]))
    return from_dict(Recipe, fields, "recipe")
