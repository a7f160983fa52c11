"""ENTRY python -m scaling.sweep: a grid of runs, planned, priced and launched; the same command resumes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scaling import compose
from scaling.config import from_dict
from scaling.cost import pool_seconds, readable_time, run_seconds
from scaling.errors import InputError, run_command
from scaling.grid import GridRuns, expand_grid, read_grid
from scaling.hardware import find_device
from scaling.sweepdir import SweepDir

HELP = """\
usage: python -m scaling.sweep +grid=NAME [SETTING=VALUE …]

Plans a grid of small training runs, prices it, and trains it on this machine. The same command again resumes what is
unfinished and retries what failed; with other values it adds their runs to the sweep.

grids (conf/grid):
{grids}

examples:
  python -m scaling.sweep +grid=width_depth dry_run=true         the table of runs, FLOPs and times; starts nothing
  python -m scaling.sweep +grid=demo                             trains it into sweeps/demo
  python -m scaling.sweep +grid=demo grid.compute_scale=3        every run at three times the compute
  python -m scaling.sweep model.width=24,32,48 flops=1e11 sweep.dir=sweeps/mine     a grid of one's own
  python -m scaling.sweep +grid=lr data=text "data.path='texts/**/*.txt'"           on one's own text

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
class SweepSettings:
    """Where a sweep goes."""

    dir: str | None = None
    """The folder; None: sweeps/NAME."""
    name: str | None = None
    """None: the grid's name."""


@dataclass(frozen=True)
class WandbSettings:
    """Whether runs are logged to wandb too."""

    mode: Literal["disabled", "offline", "online"] = "disabled"


def main(argv: Sequence[str]) -> int:
    """Expand, then print (dry_run=true) or launch."""
    if any(text in ("-h", "--help", "help") for text in argv):
        print(help_text())
        return 0
    runs = expand_grid(argv)
    config = compose.plain(runs.config)
    settings = from_dict(SweepSettings, config["sweep"], "sweep")
    wandb = from_dict(WandbSettings, config["wandb"], "wandb")
    dry_run = config["dry_run"]
    if not isinstance(dry_run, bool):
        raise InputError(f"dry_run={dry_run}: valid: true, false")
    from scaling.launch import LocalLauncher, launch

    launcher = from_dict(LocalLauncher, config["launcher"], "launcher")
    folder = Path(settings.dir or Path("sweeps") / (settings.name or runs.grid.name))
    for note in runs.notes:
        print(f"note: {note}")
    print(describe(runs, config["hardware"]["name"], launcher.pool_size, table=dry_run))
    if dry_run:
        print(f"nothing launched; without dry_run=true these runs go to {folder}")
        return 0
    return launch(SweepDir(folder), runs, argv, launcher, wandb.mode)


def describe(runs: GridRuns, device_name: str, workers: int, table: bool) -> str:
    """The runs with their cost, one a line, and the total.

    Args:
        device_name: what the times are estimated for.
        workers: runs at once.
        table: the lines too, not the total alone.
    """
    device = find_device(device_name)
    seconds = [run_seconds(spec, device) for spec in runs.specs]
    rows = [("run", "width", "depth", "N", "D", "D/N", "batch", "steps", "peak LR", "FLOPs", "time", "seed")]
    for number, (spec, time_s) in enumerate(zip(runs.specs, seconds, strict=True), 1):
        n = spec.params.body_head
        rows.append(
            (
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
                readable_time(time_s),
                str(spec.seed),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    total = (
        f"{runs.grid.name}: {len(runs.specs)} runs, {sum(s.flops for s in runs.specs):.3g} FLOPs, "
        f"{sum(s.tokens for s in runs.specs):,} tokens; about {readable_time(math.fsum(seconds))} of one {device.name}"
        f"{' core' if device.name == 'cpu' else ''}, {readable_time(pool_seconds(seconds, workers))} with {workers} at once"
    )
    return "\n".join([*lines, "N: body and head; FLOPs: exact, forward and backward", total] if table else [total])


def help_text() -> str:
    """The help, with the grids, groups and settings that there are."""
    groups = compose.groups()
    grids = [f"  {name:<12} {read_grid(name).description}" for name in groups["grid"]]
    others = [f"  {name:<12} {', '.join(options)}" for name, options in groups.items() if name != "grid"]
    return HELP.format(
        grids="\n".join(grids),
        groups="\n".join(others),
        settings="\n".join(f"  {line}" for line in _settings(compose.plain(compose.load("sweep", [])))),
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
