"""Grids: expansion, the command line's precedence, scaling, budgets, and every bad setting."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling.accounting import training_flops
from scaling.compose import groups
from scaling.errors import InputError
from scaling.grid import expand_grid, make_run, run_settings
from scaling.records import Plan

GRIDS = groups()["grid"]


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_expands_to_distinct_runs_on_budget(name: str) -> None:
    runs = expand_grid([f"+grid={name}"])
    assert len({spec.run_id for spec in runs.specs}) == len(runs.specs) >= 3
    assert all(spec.steps >= 40 for spec in runs.specs)
    assert runs.grid.name == name
    assert runs.grid.description


def test_the_grids_of_the_spine_are_there() -> None:
    named = {"demo", "isoflop", "width_depth", "lr", "lr_batch", "seeds", "branches", "adaptive", "repeats", "smoke"}
    assert named | {"experts", "mixture", "precision", "tokenizer"} <= set(GRIDS)


def test_axes_are_a_product_and_flops_are_exact() -> None:
    runs = expand_grid(["+grid=width_depth"]).specs
    shapes = {(spec.shape.width, spec.shape.depth) for spec in runs}
    assert len(runs) == len(shapes) == len({w for w, _ in shapes}) * len({d for _, d in shapes})
    for spec in runs:
        assert spec.flops == training_flops(spec.shape, spec.tokens)
        assert abs(spec.flops / 2e11 - 1) < 0.01


def test_points_times_axes_on_the_command_line() -> None:
    specs = expand_grid(["flops=1e10,2e10", "model.width=16,24,32"]).specs
    assert [(s.shape.width, round(s.flops, -9)) for s in specs] == [
        (w, f) for f in (1e10, 2e10) for w in (16, 24, 32)
    ]


def test_the_command_line_wins_over_axes_and_points() -> None:
    assert {s.shape.width for s in expand_grid(["+grid=width_depth", "model.width=24"]).specs} == {24}
    assert {s.seed for s in expand_grid(["+grid=demo", "seed=7"]).specs} == {7}
    assert {s.seed for s in expand_grid(["+grid=seeds", "seed=5,6"]).specs} == {5, 6}
    assert {s.data.name for s in expand_grid(["+grid=smoke", "data=site"]).specs} == {"site"}


def test_a_group_may_be_an_axis() -> None:
    names = {s.optim.name for s in expand_grid(["flops=1e10", "optim=muon,adamw"]).specs}
    assert names == {"muon", "adamw"}


def test_equal_points_are_one_run() -> None:
    assert len(expand_grid(["flops=1e10", "model.width=16,16,16"]).specs) == 1


def test_compute_scale_multiplies_flops_and_widens_by_the_fourth_root() -> None:
    one, sixteen = (
        expand_grid(["+grid=isoflop"]).specs,
        expand_grid(["+grid=isoflop", "sweep.compute_scale=16"]).specs,
    )
    for small, large in zip(one, sixteen, strict=True):
        assert large.shape.width == 2 * small.shape.width
        assert abs(large.flops / small.flops / 16 - 1) < 0.05


@pytest.mark.parametrize("budget", ["tokens=400000", "tokens_per_param=20"])
def test_compute_scale_holds_for_each_kind_of_budget(budget: str) -> None:
    base = expand_grid(["model=base", "model.width=1024", budget]).specs[0]
    large = expand_grid(["model=base", "model.width=1024", budget, "sweep.compute_scale=16"]).specs[0]
    assert large.shape.width == 2048
    assert 8 < large.flops / base.flops < 64  # depth grows with width in this family


def test_seed_offset_draws_the_whole_grid_again() -> None:
    seeds = [s.seed for s in expand_grid(["+grid=seeds"]).specs]
    assert [s.seed for s in expand_grid(["+grid=seeds", "sweep.seed_offset=100"]).specs] == [s + 100 for s in seeds]


def test_tokens_per_param_counts_body_and_head() -> None:
    spec = expand_grid(["tokens_per_param=12", "model.width=48"]).specs[0]
    assert math.isclose(spec.tokens / spec.params.body_head, 12, rel_tol=0.01)


def test_values_by_hand_win_over_the_recipe_and_reach_the_forecast() -> None:
    runs = expand_grid(["+grid=demo", "optim.peak_lr=0.01", "batch_tokens=1024", "schedule.warmup_tokens=2048"])
    assert {(s.optim.peak_lr, s.batch_tokens, s.schedule.warmup_tokens) for s in runs.specs} == {(0.01, 1024, 2048)}
    assert runs.base.recipe.peak_lr == 0.01


def test_make_run_again_from_a_spec_is_the_same_run() -> None:
    """What a forecast does: the parts of an existing run, with the plan's recipe."""
    runs = expand_grid(["+grid=demo"])
    spec, base = runs.specs[-1], runs.base
    again = make_run(
        base.family, spec.shape.width, flops=3e11, recipe=base.recipe, data=spec.data, optim=spec.optim,
        schedule=spec.schedule, eval=spec.eval, seed=spec.seed, precision=spec.precision,
        divergence_factor=spec.divergence_factor,
    )  # fmt: skip
    assert again.run_id == spec.run_id


def test_run_settings_are_strict() -> None:
    config = expand_grid(["flops=1e10"]).config
    config["optim"]["lr"] = 1
    with pytest.raises(InputError, match="unknown key in optim 'lr'"):
        run_settings(config)


BAD = [
    (["+grid=width_dept"], "unknown grid 'width_dept': did you mean 'width_depth'"),
    (["+grid=no/such.yaml"], "no grid file no/such.yaml"),
    (["+grid=demo", "data=sight"], "unknown data 'sight': did you mean 'site'? valid: english, headers, jsonl, "),
    (["+grid=demo", "modl.width=3"], "unknown override 'modl.width': did you mean model.width?"),
    (["+grid=demo", "width=3"], "did you mean model.width?"),
    (["+grid=demo", "optim.lr=1"], "optim.peak_lr"),
    (["+grid=demo", "nothing_like_it=1"], "valid: batch_tokens"),
    (["+grid=demo", "--dry-run"], "dry_run=VALUE"),
    (["+grid=demo", "seed"], "cannot read 'seed'"),
    (["+grid=demo", "seed=[1"], "cannot read"),
    (["+grid=demo", "~seed"], "cannot delete"),
    (["flops=1e10", "tokens=1e6"], "tokens=1e+06 and flops=1e+10 are both given"),
    (["+grid=demo", "tokens_per_param=20"], "both given"),
    ([], "no budget"),
    (["flops=0"], "must be positive"),
    (["flops=1000"], "less than one batch"),
    (["flops=1e10", "model.width=30"], "width 30 is not divisible by 4 heads"),
    (["flops=1e10", "model.width=wide"], "expected int"),
    (["flops=1e10", "model.width=8.5"], "whole number"),
    (["flops=1e10", "model.depth=null"], "exactly one of depth"),
    (["flops=1e10", "batch_tokens=1000"], "not a multiple of seq_len 128"),
    (["flops=1e10", "precision.name=fp4"], "valid: bf16, fp32"),
    (["flops=1e10", "recipe=fixed"], "recipe.peak_lr=VALUE"),
    (["flops=1e10", "recipe.min_steps=0"], "must be positive"),
    (["flops=1e10", "schedule.warmup_tokens=1e9"], "must be below"),
    (["flops=1e10", "data=text"], "data.path=GLOB"),
    (["flops=1e10", "sweep.compute_scale=0"], "must be positive"),
    (["flops=1e10", "eval=3"], "eval"),
    (["flops=1e10", "seed=null"], "seed"),
]


@pytest.mark.parametrize(("args", "message"), BAD)
def test_bad_settings(args: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        expand_grid(args)


def test_plan_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"schema_version": 99}')
    with pytest.raises(InputError, match="newer isoflop"):
        Plan.read(tmp_path / "plan.json")


Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_dry_run_prints_the_table_and_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    done = cli("scaling.sweep", "+grid=width_depth", "dry_run=true")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "25 runs, 5e+12 FLOPs" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args", [BAD[0][0], BAD[10][0], ["+grid=demo", "dry_run=perhaps"], ["+grid=demo", "launcher=slrm"]]
)
def test_bad_command_is_one_line_exit_2_and_nothing_written(cli: Cli, tmp_path: Path, args: list[str]) -> None:
    done = cli("scaling.sweep", *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_grids(cli: Cli) -> None:
    done = cli("scaling.sweep", "--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in [*GRIDS, "model.width=", "dry_run"])


def test_planner_starts_without_torch_and_pandas(cli: Cli) -> None:
    code = (
        "import sys; from scaling.sweep import main; main(['+grid=width_depth', 'dry_run=true']); "
        "print([m for m in ('torch', 'pandas', 'scipy', 'submitit', 'matplotlib') if m in sys.modules])"
    )
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
