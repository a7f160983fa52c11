"""Sweeps in rounds: launch, let `python -m analysis.design` choose the next runs from those that are done, launch again.

Adaptive: a pilot of PILOT_SHARE of the budget, then the runs that narrow the forecast most, cheap ones first.
Re-centred IsoFLOP: two budgets as the grid has them, then each next one about the N* that the runs so far say.
What a round chose is a grid file, SWEEP/rounds/NN.yaml: the same command reads those that are there and goes on.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scaling.compose import read_grid_file
from scaling.config import from_dict
from scaling.cost import run_seconds
from scaling.errors import InputError
from scaling.files import read_json, write_json
from scaling.grid import Grid, GridRuns, expand_grid
from scaling.hardware import Device, find_device
from scaling.spec import RunSpec
from scaling.sweepdir import SweepDir

PILOT_SHARE = 0.1
"""Of an adaptive sweep's budget."""
LARGEST_SHARE = 0.25
"""Of an adaptive sweep's budget: the most that one run may take; half of it where that is about as good."""
LEVEL_GAP = 1.2
"""Runs whose compute is within this factor belong to one IsoFLOP budget."""

Launch = Callable[[Sequence[str], GridRuns], int]
"""Trains the runs of a command line; exit status."""


def run_rounds(argv: Sequence[str], grid: GridRuns, folder: Path, launch: Launch) -> int:
    """All rounds of a sweep, or those that can run now.

    Args:
        argv: the command line.
        grid: what it expands to: the pilot, or all budgets of an IsoFLOP grid.
        launch: called for each round.
    Returns:
        Exit status: 0 when every round is through or waits for its jobs, else that of the round that failed.
    Raises:
        InputError: settings that do not go together, or other ones than the sweep's rounds began with.
    """
    if grid.sweep.branches:
        raise InputError(
            "sweep.branches=true with rounds: later rounds are not known yet, so trunks cannot be planned"
        )
    return _recentred(argv, grid, folder, launch) if grid.sweep.recentre else _adaptive(argv, grid, folder, launch)


def describe_rounds(grid: GridRuns) -> str:
    """What a dry run says beside its first round."""
    if grid.sweep.recentre:
        return "re-centred: from the third budget on, sizes move to the N* that the runs before say"
    budget, device = _budget(grid)
    unit = "FLOPs" if device is None else f"{device.name} hours"
    return (
        f"adaptive: this is the grid of the pilot, which is scaled to {PILOT_SHARE:.0%} of {budget:.3g} {unit}; "
        f"{grid.sweep.rounds} rounds spend the rest on what narrows the forecast at {_target(grid):.3g} FLOPs most"
    )


def extent(grid: GridRuns, device: Device) -> tuple[float, float]:
    """Expected seconds of the longest run on a device, and the runs' mean width, each weighed by its seconds.

    An adaptive sweep is taken for its grid scaled, as sweep.compute_scale does, until the longest run has LARGEST_SHARE of
    the budget.
    """
    seconds = [run_seconds(spec, device) for spec in grid.specs]
    width = math.fsum(s * spec.shape.width for s, spec in zip(seconds, grid.specs, strict=True)) / math.fsum(seconds)
    if not grid.grid.adaptive:
        return max(seconds), width
    budget, hours_of = _budget(grid)
    scale = LARGEST_SHARE * budget * _flops_per_cost(grid.specs, hours_of) / max(spec.flops for spec in grid.specs)
    return max(seconds) * scale, width * scale**0.25


def _adaptive(argv: Sequence[str], grid: GridRuns, folder: Path, launch: Launch) -> int:
    sweep, target, (budget, device) = SweepDir(folder), _target(grid), _budget(grid)
    whole = _cost(grid.specs, device)
    settings: dict[str, Any] = {
        "target_flops": target,
        "budget": budget,
        "device": device.name if device is not None else None,
        "rounds": grid.sweep.rounds,
        "pilot_scale": PILOT_SHARE * budget / whole * grid.sweep.compute_scale,
    }
    _keep(folder, settings)
    pilot = [*argv, f"sweep.compute_scale={settings['pilot_scale']:.6g}"]
    ended = _run(pilot, expand_grid(pilot), sweep, launch)
    for k in range(1, grid.sweep.rounds + 1):
        if ended is not None:
            return ended
        file = _file(folder, k)
        if not file.exists():
            left = budget - _cost(sweep.plan().runs, device)
            if left < _cheapest(sweep, device):
                break
            unit = ["--budget-flops", f"{left:.8g}"]
            if device is not None:
                unit = ["--budget-hours", f"{left:.8g}", "--device", device.name]
            spend = left / (grid.sweep.rounds - k + 1)
            largest = LARGEST_SHARE * budget * _flops_per_cost(sweep.plan().runs, device)
            options = ["--target", f"{target:.8g}", *unit, "--spend", f"{spend:.8g}", "--largest", f"{largest:.8g}"]
            _design(folder, k, options)
        ended = _run_file(argv, file, sweep, launch)
    return ended or 0


def _recentred(argv: Sequence[str], grid: GridRuns, folder: Path, launch: Launch) -> int:
    budgets = _budgets(grid.specs)
    if len(budgets) < 3:
        raise InputError(
            f"sweep.recentre=true on {len(budgets)} compute budgets: re-centring starts at the third, so give a grid of "
            "three or more (+grid=isoflop)"
        )
    _keep(folder, {"recentre": [round(math.log(b[0].flops), 1) for b in budgets]})
    sweep = SweepDir(folder)
    ended = _run(argv, dataclasses.replace(grid, specs=[*budgets[0], *budgets[1]]), sweep, launch)
    for k, specs in enumerate(budgets[2:], 1):
        if ended is not None:
            return ended
        file = _file(folder, k)
        if not file.exists():
            widths = ",".join(str(w) for w in sorted({s.shape.width for s in specs}))
            seeds = ",".join(str(s) for s in sorted({s.seed for s in specs}))
            flops = math.exp(math.fsum(math.log(s.flops) for s in specs) / len(specs))
            _design(folder, k, ["--recentre", f"{flops:.8g}", "--widths", widths, "--seeds", seeds])
        ended = _run_file(argv, file, sweep, launch)
    return ended or 0


def _design(folder: Path, k: int, options: Sequence[str]) -> None:
    """Choose round k's runs in a process of its own: the planner does not import the science.

    Raises:
        SystemExit: it failed and has said why on stderr; with its exit status.
    """
    command = [sys.executable, "-m", "analysis.design", str(folder), *options, "--out", str(_file(folder, k))]
    print(f"round {k}: ", end="", flush=True)
    done = subprocess.run(command)
    if done.returncode:
        raise SystemExit(done.returncode)


def _run_file(argv: Sequence[str], file: Path, sweep: SweepDir, launch: Launch) -> int | None:
    """A round's runs, as they were chosen: neither scaled nor with other seeds."""
    grid = from_dict(Grid, read_grid_file(file), file.name)
    overrides = [*argv, "sweep.compute_scale=1", "sweep.seed_offset=0"]
    return _run(overrides, expand_grid(overrides, grid.points), sweep, launch)


def _file(folder: Path, k: int) -> Path:
    return folder / "rounds" / f"{k:02d}.yaml"


def _keep(folder: Path, began: dict[str, Any]) -> None:
    """Write what the rounds began with; rounds that began with something else are not mixed with it."""
    path = folder / "rounds" / "settings.json"
    if not path.exists():
        write_json(path, began)
    kept: dict[str, Any] = read_json(path, "settings of the rounds")
    changed = [f"{k} {_shown(kept.get(k))} → {_shown(v)}" for k, v in began.items() if kept.get(k) != v]
    if changed:
        raise InputError(
            f"the rounds of {folder} began with other settings ({', '.join(changed)}): give the same, or another sweep.dir"
        )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _run(argv: Sequence[str], grid: GridRuns, sweep: SweepDir, launch: Launch) -> int | None:
    """Launch a round. Its exit status where the sweep ends here: it failed, or was detached before its runs were through."""
    status = launch(argv, grid)
    if status:
        return status
    plan = sweep.plan()
    states = [sweep.run(plan.prepared(spec).run_id).state() for spec in grid.specs]
    waiting = sum(state in ("pending", "running") for state in states)
    if not waiting:
        return None
    print(f"{sweep.path}: {waiting} runs of this round are not through: the same command goes on from there")
    return 0


def _target(grid: GridRuns) -> float:
    target = grid.config["target_flops"] or grid.grid.target_flops
    if target is None or not 0 < float(target) < math.inf:
        raise InputError(f"target_flops={target}: give the FLOPs of the run that the sweep is to forecast")
    return float(target)


def _budget(grid: GridRuns) -> tuple[float, Device | None]:
    """The budget in exact FLOPs (None), or in hours of a device."""
    flops, hours = grid.sweep.budget_flops, grid.sweep.budget_gpu_hours
    if (flops is None) == (hours is None):
        raise InputError(
            f"sweep.budget_flops={flops}, sweep.budget_gpu_hours={hours}: give exactly one, what the sweep may spend"
        )
    if flops is not None:
        return flops, None
    assert hours is not None
    return hours, find_device(grid.config["hardware"]["name"])


def _cost(specs: Sequence[RunSpec], device: Device | None) -> float:
    return math.fsum(s.flops if device is None else run_seconds(s, device) / 3600 for s in specs)


def _cheapest(sweep: SweepDir, device: Device | None) -> float:
    """What the cheapest run so far cost: less than this buys nothing."""
    return min(_cost([spec], device) for spec in sweep.plan().runs)


def _flops_per_cost(specs: Sequence[RunSpec], device: Device | None) -> float:
    """Exact FLOPs that a unit of cost buys, at the dearest run so far."""
    if device is None:
        return 1.0
    dearest = max(specs, key=lambda s: s.flops)
    return dearest.flops / _cost([dearest], device)


def _budgets(specs: Sequence[RunSpec]) -> list[list[RunSpec]]:
    """The runs by compute budget, ascending."""
    out: list[list[RunSpec]] = []
    for spec in sorted(specs, key=lambda s: s.flops):
        if out and spec.flops <= out[-1][0].flops * LEVEL_GAP:
            out[-1].append(spec)
        else:
            out.append([spec])
    return out
