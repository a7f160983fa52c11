"""A grid's YAML and a configuration to RunSpecs. Pure: reads no corpus, starts nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from scaling import compose
from scaling.accounting import count_params, flops_per_token
from scaling.branches import plan_branches
from scaling.config import from_dict
from scaling.errors import InputError
from scaling.recipe import Recipe, recipe_from_dict
from scaling.shape import ShapeFamily
from scaling.spec import DataSpec, EvalSpec, OptimSpec, RunSpec, ScheduleSpec

BUDGETS = ("tokens", "flops", "tokens_per_param")
AUTO = "auto"
"""A precision that scaling.sweep chooses before the grid is expanded."""
SHARED_RECIPE = (0.6, 3.0)
"""Lengths, as multiples of the one that a trunk's recipe was asked at, that lost .5% at most to runs with a recipe of
their own; a third of it and eight times it lost 2% (bench/branching.py)."""


@dataclass(frozen=True)
class Grid:
    """A sweep's runs: the product of `axes`, times each of `points`, on top of `overrides` and the command line.

    A setting named on the command line wins over the grid's own, everywhere in it.
    """

    name: str
    description: str = ""
    overrides: list[str] = field(default_factory=list)
    """Settings of every run."""
    axes: dict[str, str | int | float] = field(default_factory=dict)
    """Setting → its values, in Hydra's grammar: "a,b,c" or "range(0,5)"."""
    points: list[list[str]] = field(default_factory=list)
    """Lists of settings; a value that is a list makes the point a product."""
    target_flops: float | None = None
    """Compute of the run that this grid is meant to forecast."""
    adaptive: bool = False
    """The points are a pilot; rounds of chosen runs follow (scaling.rounds)."""


@dataclass(frozen=True)
class SweepSettings:
    """Where a sweep goes, and transformations of its whole grid."""

    dir: str | None = None
    """The folder; None: sweeps/NAME."""
    name: str | None = None
    """None: the grid's name."""
    compute_scale: float = 1.0
    """Every run's FLOPs times this: width times its fourth root, tokens (where they are given) times its square root."""
    seed_offset: int = 0
    """Added to every run's seed: another draw of the whole grid."""
    wait: bool = True
    """launcher=slurm: stay until the jobs are through; False: submit them and end."""
    any_commit: bool = False
    """Go on with a sweep that was planned with other code."""
    branches: bool = False
    """Runs that differ in length alone share a trunk: its stable phase is trained once. Needs a WSD schedule."""
    recentre: bool = False
    """From the third IsoFLOP budget on, sizes move to the N* that the runs before say (scaling.rounds)."""
    budget_flops: float | None = None
    """+grid=adaptive: exact FLOPs of the whole sweep. Exactly one of this and budget_gpu_hours."""
    budget_gpu_hours: float | None = None
    """+grid=adaptive: estimated hours of `hardware`."""
    rounds: int = 2
    """+grid=adaptive: how often runs are chosen after the pilot."""
    max_cost: float | None = None
    """USD, rent on demand: a sweep that is estimated above it is refused, its earlier runs included."""
    max_gpu_hours: float | None = None
    """The same for hours of `hardware`."""
    expect: str | None = None
    """dry_run=true: say the forecast interval to expect if this loss surface were true (python -m analysis.simulate)."""
    trunk_tokens_per_param: float = 20.0
    """With branches the recipe is asked at D = this times N (body and head), whatever a run's own length: runs of one
    trunk have one learning rate, batch and warm-up, also those that are added later."""

    def __post_init__(self) -> None:
        for name in ("compute_scale", "trunk_tokens_per_param"):
            if not getattr(self, name) > 0:
                raise InputError(f"sweep.{name} = {getattr(self, name)}: must be positive")
        for name in ("budget_flops", "budget_gpu_hours", "rounds", "max_cost", "max_gpu_hours"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"sweep.{name} = {value}: must be positive")


@dataclass(frozen=True)
class RunSettings:
    """One point of a grid, read strictly: what `make_run` takes."""

    family: ShapeFamily
    width: int
    recipe: Recipe
    data: DataSpec
    optim: OptimSpec
    schedule: ScheduleSpec
    eval: EvalSpec
    precision: Literal["fp32", "bf16", "fp8"]
    seed: int
    divergence_factor: float
    tokens: float | None = None
    flops: float | None = None
    tokens_per_param: float | None = None
    recipe_tokens_per_param: float | None = None

    def scaled(self, scale: float) -> RunSettings:
        """The same point at `scale` times the compute: N and D each by its square root."""
        if scale == 1:
            return self
        step = self.family.width_multiple
        return dataclasses.replace(
            self,
            width=max(1, round(self.width * scale**0.25 / step)) * step,
            tokens=self.tokens and self.tokens * scale**0.5,
            flops=self.flops and self.flops * scale,
        )

    def run(self) -> RunSpec:
        """The RunSpec of this point."""
        return make_run(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


def make_run(
    family: ShapeFamily,
    width: int,
    *,
    tokens: float | None = None,
    flops: float | None = None,
    tokens_per_param: float | None = None,
    recipe: Recipe,
    data: DataSpec,
    optim: OptimSpec,
    schedule: ScheduleSpec,
    eval: EvalSpec,
    seed: int = 0,
    precision: Literal["fp32", "bf16", "fp8"] = "fp32",
    divergence_factor: float = 2.0,
    recipe_tokens_per_param: float | None = None,
) -> RunSpec:
    """The run of this width and budget, with the recipe's hyperparameters.

    Args:
        family: gives the shape of `width`.
        tokens: D. Exactly one of tokens, flops (exact, forward and backward) and tokens_per_param (of body and head).
        recipe: sets peak_lr, batch_tokens, warmup_tokens, weight_decay and beta2.
        optim: its other fields; those that the recipe sets are replaced.
        schedule: its other fields; warmup_tokens is replaced.
        recipe_tokens_per_param: D / N (body and head) at which the recipe is asked; None: at the run's own.
    Returns:
        A spec whose tokens are the budget's, rounded to whole batches.
    Raises:
        InputError: not exactly one budget, a budget below one batch, or a shape that cannot be.
    """
    shape = family.shape(width)
    params, per_token = count_params(shape), flops_per_token(shape).train
    budget = one_budget({"tokens": tokens, "flops": flops, "tokens_per_param": tokens_per_param})
    wanted = {
        "tokens": lambda v: v,
        "flops": lambda v: v / per_token,
        "tokens_per_param": lambda v: v * params.active("body_head"),
    }[budget[0]](budget[1])
    asked = wanted if recipe_tokens_per_param is None else recipe_tokens_per_param * params.active("body_head")
    hyper = recipe.hyperparameters(params, asked, asked * per_token, shape)
    ramp_tokens = sum(stage.tokens for stage in hyper.batch_ramp)
    steps = round((wanted - ramp_tokens) / hyper.batch_tokens)
    if steps < 1:
        raise InputError(
            f"{budget[0]}={budget[1]:g} at width {width} is {wanted:.0f} tokens, less than one batch of "
            f"{hyper.batch_tokens}: raise the budget or lower the batch"
        )
    if recipe_tokens_per_param is not None and hyper.warmup_tokens >= wanted:
        raise InputError(
            f"{budget[0]}={budget[1]:g} at width {width} is {wanted:.0f} tokens, within the {hyper.warmup_tokens} of its "
            f"trunk's warm-up, whose recipe is asked at {recipe_tokens_per_param:g} tokens per parameter: lower "
            "sweep.trunk_tokens_per_param, or give schedule.warmup_tokens"
        )
    optim = dataclasses.replace(optim, peak_lr=hyper.peak_lr, weight_decay=hyper.weight_decay, beta2=hyper.beta2)
    return RunSpec(
        shape=shape,
        data=data,
        tokens=ramp_tokens + steps * hyper.batch_tokens,
        batch_tokens=hyper.batch_tokens,
        optim=optim,
        schedule=dataclasses.replace(schedule, warmup_tokens=hyper.warmup_tokens),
        eval=eval,
        seed=seed,
        precision=precision,
        divergence_factor=divergence_factor,
        batch_ramp=hyper.batch_ramp,
        transfer=recipe.transfer_from(family),
    )


def one_budget(given: Mapping[str, float | None]) -> tuple[str, float]:
    """The one of tokens, flops and tokens_per_param that is set, with its value."""
    found = [(name, value) for name, value in given.items() if value is not None]
    if not found:
        raise InputError(f"no budget: give exactly one of {', '.join(BUDGETS)} (or a grid that does, +grid=NAME)")
    if len(found) > 1:
        both = " and ".join(f"{name}={value:g}" for name, value in found)
        raise InputError(f"{both} are both given: give exactly one ({found[0][0]}=null unsets it)")
    if not found[0][1] > 0:
        raise InputError(f"{found[0][0]}={found[0][1]:g}: must be positive")
    return found[0]


def run_settings(config: Mapping[str, Any]) -> RunSettings:
    """Read a composed configuration strictly. Values given for the optimizer, the schedule or the batch win over the recipe."""
    model, optim, schedule, recipe = (dict(config[name]) for name in ("model", "optim", "schedule", "recipe"))
    if config["precision"]["name"] == AUTO:
        raise InputError(
            "precision=auto is for all runs of a sweep alike: name the precisions of an axis, precision=fp32,bf16"
        )
    given = {
        "peak_lr": optim.pop("peak_lr"),
        "weight_decay": optim.pop("weight_decay"),
        "beta2": optim.pop("beta2"),
        "warmup_tokens": schedule.pop("warmup_tokens"),
        "batch_tokens": config["batch_tokens"],
    }
    recipe.update({name: value for name, value in given.items() if value is not None})
    point = {name: config[name] for name in (*BUDGETS, "eval", "data", "seed", "divergence_factor")}
    return from_dict(
        RunSettings,
        {
            **point,
            "family": from_dict(ShapeFamily, {k: v for k, v in model.items() if k != "width"}, "model"),
            "width": model["width"],
            "recipe": recipe_from_dict(recipe),
            # the learning rate and the warm-up of a template: make_run puts the recipe's in their place
            "optim": from_dict(OptimSpec, {**optim, "peak_lr": 1.0}, "optim"),
            "schedule": from_dict(ScheduleSpec, {**schedule, "warmup_tokens": 0}, "schedule"),
            "precision": config["precision"]["name"],
        },
    )


@dataclass(frozen=True)
class GridRuns:
    """An expanded grid."""

    grid: Grid
    config: dict[str, Any]
    """The configuration without the grid's axes and points."""
    sweep: SweepSettings
    base: RunSettings
    """The run that the axes and points vary: its family and recipe are the sweep's."""
    specs: list[RunSpec]
    """The runs, each once, in the grid's order; their data not prepared yet."""
    notes: list[str]
    """Warnings of the recipe, each once."""


def read_grid(name: str) -> Grid:
    """The grid `conf/grid/NAME.yaml`.

    Raises:
        InputError: no such grid.
    """
    return _grid(compose.load("sweep", [f"grid={name}"]))


def _grid(config: Mapping[str, Any]) -> Grid:
    if "grid" not in config:
        return Grid(name="custom", description="the command line's own")
    return from_dict(Grid, config["grid"], "grid")


def asks_auto(overrides: Sequence[str]) -> bool:
    """Whether a command line, or its grid, leaves the precision of the sweep to be chosen (scaling.precision)."""
    _, _, config = _composed([text.lstrip("+") for text in overrides])
    return bool(config["precision"]["name"] == AUTO)


def _composed(overrides: Sequence[str]) -> tuple[Grid, list[str], dict[str, Any]]:
    """The grid, the settings of all its runs, and the configuration that they make; axes left out."""
    command = [text for text in overrides if not compose.parse_override(text).is_sweep_override()]
    grid = _grid(compose.load("sweep", command))
    base = [*grid.overrides, *command]
    return grid, base, compose.load("sweep", base)


def expand_grid(overrides: Sequence[str], points: Sequence[Sequence[str]] | None = None) -> GridRuns:
    """The runs of a command line: `+grid=NAME` and settings; a setting with several values (a,b,c) is an axis.

    Args:
        points: instead of the grid's.
    Raises:
        InputError: unknown grid, group or setting; a value that does not fit; a shape or budget that cannot be.
    """
    overrides = [text.lstrip("+") for text in overrides]
    named = {compose.parse_override(text).key_or_group for text in overrides}
    own_axes = [text for text in overrides if compose.parse_override(text).is_sweep_override()]
    grid, base, config = _composed(overrides)
    if points is not None:
        grid = dataclasses.replace(grid, points=[list(point) for point in points])
    sweep = from_dict(SweepSettings, config["sweep"], "sweep")

    axes = [f"{key}={values}" for key, values in grid.axes.items() if key not in named] + own_axes
    specs: dict[str, RunSpec] = {}
    notes: dict[str, None] = {}
    for product in compose.expand(axes):
        for listed in grid.points or [[]]:
            point = [text for text in listed if compose.parse_override(text).key_or_group not in named]
            for chosen in compose.expand(point):
                settings = run_settings(compose.load("sweep", [*base, *product, *chosen])).scaled(sweep.compute_scale)
                settings = dataclasses.replace(
                    settings,
                    seed=settings.seed + sweep.seed_offset,
                    recipe_tokens_per_param=sweep.trunk_tokens_per_param if sweep.branches else None,
                )
                spec = settings.run()
                specs.setdefault(spec.run_id, spec)
                share = (settings.recipe_tokens_per_param or 0) * spec.params.active("body_head") / spec.tokens or 1.0
                hyper = settings.recipe.hyperparameters(
                    spec.params, share * spec.tokens, share * spec.flops, spec.shape
                )
                if hyper.note:
                    notes[hyper.note] = None
    runs = list(specs.values())
    if sweep.branches:
        runs = plan_branches(runs)
        ratios = [run.tokens / (sweep.trunk_tokens_per_param * run.params.active("body_head")) for run in runs]
        if min(ratios) < SHARED_RECIPE[0] or max(ratios) > SHARED_RECIPE[1]:
            notes[
                f"lengths from {min(ratios):.2g} to {max(ratios):.2g} times the {sweep.trunk_tokens_per_param:g} tokens per "
                f"parameter of their trunks' recipe: outside {SHARED_RECIPE[0]:g} to {SHARED_RECIPE[1]:g} one learning "
                "rate and batch cost up to 2% of loss; move sweep.trunk_tokens_per_param or buy a narrower range"
            ] = None
    return GridRuns(grid, config, sweep, run_settings(config), runs, list(notes))
