"""ENTRY python -m scaling.sweep: a grid of runs, planned, priced and launched; the same command resumes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scaling import compose
from scaling.config import from_dict
from scaling.cost import pool_seconds, run_seconds
from scaling.errors import InputError, run_command
from scaling.grid import GridRuns, asks_auto, expand_grid, read_grid
from scaling.hardware import find_device
from scaling.precision import choose_for, with_precision
from scaling.price import check_limits, describe_price, expected_interval, price
from scaling.rounds import describe_rounds, run_rounds
from scaling.spec import RunSpec
from scaling.sweepdir import SweepDir
from scaling.text import readable_time, table
from scaling.varied import describe_settings, varied_settings

HELP = """\
usage: python -m scaling.sweep +grid=NAME [SETTING=VALUE …]

Plans a grid of small training runs, prices it, and trains it on this machine or on SLURM. The same command again resumes
what is unfinished and retries what failed; with other values it adds their runs to the sweep.

grids (conf/grid):
{grids}

examples:
  python -m scaling.sweep +grid=width_depth dry_run=true         the table of runs, FLOPs and times; starts nothing
  python -m scaling.sweep +grid=demo dry_run=true sweep.expect=hoffmann     and the forecast interval to expect
  python -m scaling.sweep +grid=demo                             trains it into sweeps/demo
  python -m scaling.sweep +grid=isoflop hardware=h100 sweep.max_cost=20     refused if it would cost more
  python -m scaling.sweep +grid=demo sweep.compute_scale=3        every run at three times the compute
  python -m scaling.sweep model.width=24,32,48 flops=1e11 sweep.dir=sweeps/mine     a grid of one's own
  python -m scaling.sweep +grid=isoflop sweep.branches=true       lengths of one size cool down from one trunk
  python -m scaling.sweep +grid=isoflop sweep.recentre=true       each budget about the N* that those before it say
  python -m scaling.sweep +grid=isoflop precision=auto            bf16 where it pays, for all runs or none, saying why
  python -m scaling.sweep +grid=adaptive target_flops=3e13 sweep.budget_flops=5e12     rounds of the runs that say most
  python -m scaling.sweep +grid=next.yaml sweep.dir=sweeps/mine     a grid file, as analysis.design writes it: adds its runs
  python -m scaling.sweep +grid=lr data=text "data.path='texts/**/*.txt'"           on one's own text
  python -m scaling.sweep +grid=demo launcher=slurm launcher.partition=cpu sweep.wait=false     as SLURM jobs, detached

A setting with several values (a,b,c) is an axis; a setting on the command line wins over the grid's.
The budget is exactly one of flops, tokens, tokens_per_param. What the optimizer, the schedule and the batch leave
null, the recipe sets.

groups (GROUP=OPTION):
{groups}

settings and their defaults:
{settings}

exit status: 0 done, 1 some runs failed, 2 bad input, 130 interrupted
"""


@dataclass(frozen=True)
class WandbSettings:
    """Whether runs are logged to wandb too."""

    mode: Literal["disabled", "offline", "online"] = "disabled"


def main(argv: Sequence[str]) -> int:
    """Expand, then print (dry_run=true) or launch."""
    if any(text in ("-h", "--help", "help") for text in argv):
        print(help_text())
        return 0
    is_auto = asks_auto(argv)
    runs = expand_grid(with_precision(argv, "fp32") if is_auto else argv)
    config = runs.config
    wandb = from_dict(WandbSettings, config["wandb"], "wandb")
    dry_run = config["dry_run"]
    if not isinstance(dry_run, bool):
        raise InputError(f"dry_run={dry_run}: valid: true, false")
    from scaling.launch import LocalLauncher, SlurmLauncher, launch

    kind: type[LocalLauncher | SlurmLauncher] = (
        SlurmLauncher if config["launcher"]["name"] == "slurm" else LocalLauncher
    )
    launcher = from_dict(kind, config["launcher"], "launcher")
    folder = Path(runs.sweep.dir or Path("sweeps") / (runs.sweep.name or runs.grid.name))
    hardware = config["hardware"]["name"]
    if is_auto:
        precision, why = choose_for(runs, SweepDir(folder), launcher.name, launcher.device)
        print(f"precision={precision}: {why}")
        argv = with_precision(argv, precision)
        runs = expand_grid(argv)

    def run(overrides: Sequence[str], some: GridRuns) -> int:
        for note in some.notes:
            print(f"note: {note}")
        print(describe(some, hardware, launcher.pool_size, lines=dry_run))
        if dry_run and some.sweep.expect is not None:
            print(expected_interval(some.specs, _target_flops(some), some.sweep.expect))
        check_limits(some.specs, some.sweep, SweepDir(folder), find_device(hardware), launcher.device)
        if dry_run:
            print(f"nothing launched; without dry_run=true these runs go to {folder}")
            return 0
        return launch(SweepDir(folder), some, overrides, launcher, wandb.mode, hardware=hardware)

    if runs.grid.adaptive and runs.sweep.expect is not None:
        raise InputError(
            f"sweep.expect={runs.sweep.expect} on an adaptive grid: its runs are not known before the pilot's losses are; "
            "ask for a fixed grid, +grid=isoflop"
        )
    if not (runs.grid.adaptive or runs.sweep.recentre):
        return run(argv, runs)
    if dry_run:
        print(describe_rounds(runs))
        return run(argv, runs)
    return run_rounds(argv, runs, folder, run)


def _target_flops(runs: GridRuns) -> float | None:
    """Compute of the run that the sweep is meant to forecast, where it is said."""
    return runs.config["target_flops"] or runs.grid.target_flops


def describe(runs: GridRuns, device_name: str, workers: int, lines: bool) -> str:
    """The runs with their cost, one a line, and the total.

    Args:
        device_name: what the times are estimated for.
        workers: runs at once.
        lines: the runs too, not the total alone.
    """
    device = find_device(device_name)
    seconds = [run_seconds(spec, device) for spec in runs.specs]
    bought, separately = (math.fsum(getattr(s, name) for s in runs.specs) for name in ("bought_flops", "flops"))
    saved = f" ({separately:.3g} without trunks: ×{separately / bought:.2f})" if bought < separately else ""
    total = (
        f"{runs.grid.name}: {len(runs.specs)} runs, {bought:.3g} FLOPs{saved}, "
        f"{sum(s.trained_tokens for s in runs.specs):,} tokens; about {readable_time(math.fsum(seconds))} of one {device.name}"
        f"{' core' if device.name == 'cpu' else ''}, {readable_time(pool_seconds(seconds, workers))} with {workers} at once"
        f"\n{describe_price(price(runs.specs, device), device)}"
    )
    if not lines:
        return total
    heading = (
        "run",
        "width",
        "depth",
        "N",
        "D",
        "D/N",
        "batch",
        "steps",
        "peak LR",
        "FLOPs",
        "bought",
        "time",
        "seed",
        "",
    )
    varied = map(describe_settings, varied_settings(runs.specs))
    rows = [
        (*_row(number, spec, time_s), settings)
        for number, (spec, time_s, settings) in enumerate(zip(runs.specs, seconds, varied, strict=True), 1)
    ]
    return f"{table([heading, *rows])}\nN: body and head; FLOPs: exact, forward and backward; bought: those after the trunk\n{total}"


def _row(number: int, spec: RunSpec, time_s: float) -> tuple[str, ...]:
    n = spec.params.body_head
    return (
        str(number),
        str(spec.shape.width),
        str(spec.shape.depth),
        f"{n:,}",
        f"{spec.tokens:,}",
        f"{spec.tokens / n:.1f}",
        f"{spec.batch_tokens:,}",
        f"{spec.steps:,}",
        f"{spec.optim.peak_lr:.4g}",
        f"{spec.flops:.3g}",
        f"{spec.bought_flops:.3g}",
        readable_time(time_s),
        str(spec.seed),
    )


def help_text() -> str:
    """The help, with the grids, groups and settings that there are."""
    groups = compose.groups()
    grids = [f"  {name:<12} {read_grid(name).description}" for name in groups["grid"]]
    others = [f"  {name:<12} {', '.join(options)}" for name, options in groups.items() if name != "grid"]
    return HELP.format(
        grids="\n".join(grids),
        groups="\n".join(others),
        settings="\n".join(f"  {line}" for line in _settings(compose.load("sweep", []))),
    ).rstrip()


def _settings(node: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key, value in node.items():
        if isinstance(value, dict):
            lines += _settings(value, f"{prefix}{key}.")
        else:
            lines.append(
                f"{prefix}{key}={'null' if value is None else str(value).lower() if isinstance(value, bool) else value}"
            )
    return lines


if __name__ == "__main__":
    run_command(main)
