"""Does the watch find a planted fault soon, and leave sound runs alone?

Real runs of model=demo on data=stdlib, trained here one after another by the engine's own loop. A small sweep gives the fit and
the forecast of a target twice its largest run; the target is then trained with other seeds, sound and with one fault each:
  rate      every update is four times what the log says (the learning rate that the log shows is the planned one)
  shard     from a random step on, for a fifth of the run, the tokens are noise: a corrupted shard
  half      from a random step on, half of each batch is a copy of the other: two ranks read the same rows
A fault is found when the first alarm comes within 10% of the run after its onset; an alarm before the onset, or of a sound
run at any time, is a false one. Faulty runs end a little after they should have been found.

python bench/watch.py [--sound 20] [--faulty 10] [--batch 0] [--keep DIR]   (DIR keeps the runs: the same command goes on from there)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import train.engine.loop as loop
from analysis.decide.alarm import alarm_limit, assess
from analysis.decide.forecast import make_forecast
from analysis.inference import fit_law
from analysis.runs import load_runs
from scaling.branches import with_digests
from scaling.errors import InputError, run_command
from scaling.grid import expand_grid
from scaling.records import Forecast, Plan
from scaling.spec import RunSpec
from scaling.sweepdir import RunDir, SweepDir
from scaling.text import table
from train.data.shards import prepare
from train.engine import train
from train.engine.trainer import Trainer

GRID = [
    "model=demo", "data=stdlib", "eval.points=5", "eval.tokens=8192", "recipe.batch_multiplier=2",
    "model.width=16,24", "flops=6e9,1.2e10,2.4e10", "seed=0,1,2",
]  # fmt: skip
TARGET_FLOPS = 4.8e10
WITHIN = 0.1
"""Of the run: how soon a fault is to be found."""


class Enough(Exception):
    """The run has come past where its fault should have been found: the rest would say nothing more."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong, and from which step on."""

    kind: str
    onset: int

    def last_step(self, steps: int) -> int:
        """Training beyond it is left out."""
        return min(steps, self.onset + math.ceil((WITHIN + 0.04) * steps))


def faulty_trainer(fault: Fault) -> type[Trainer]:
    """A Trainer with the fault."""

    class Faulty(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if fault.kind == "rate":
                plain = self.optimizers.step
                self.optimizers.step = lambda factor: plain(4 * factor)  # type: ignore[method-assign]

        def step(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> dict[str, float]:
            at = self.progress.step
            if at >= fault.last_step(self.spec.steps):
                raise Enough
            if fault.kind == "shard" and fault.onset <= at < fault.onset + self.spec.steps // 5:
                noise = torch.Generator().manual_seed(at)
                size = (inputs_BT.shape[0], inputs_BT.shape[1] + 1)
                tokens = torch.randint(self.spec.shape.vocab_size, size, generator=noise)
                inputs_BT, targets_BT = tokens[:, :-1].to(inputs_BT), tokens[:, 1:].to(targets_BT)
            if fault.kind == "half" and at >= fault.onset:
                half = (len(inputs_BT) + 1) // 2
                inputs_BT, targets_BT = (torch.cat([x[:half], x[: len(x) - half]]) for x in (inputs_BT, targets_BT))
            return super().step(inputs_BT, targets_BT)

    return Faulty


def train_one(spec: RunSpec, folder: Path, fault: Fault | None) -> list[dict[str, Any]]:
    """Train a run, with a fault or none. Returns its metrics."""
    sound, run = loop.Trainer, RunDir(folder)
    if fault is not None:
        done = run.metrics() if run.spec_json.exists() else []
        if done and done[-1]["step"] >= fault.last_step(spec.steps):
            return done
        loop.Trainer = faulty_trainer(fault)  # type: ignore[misc]
    try:
        with contextlib.suppress(Enough):
            train(spec, run)
    finally:
        loop.Trainer = sound  # type: ignore[misc]
    return run.metrics()


def sweep_and_forecast(folder: Path) -> Forecast:
    """Train the small sweep and forecast the target."""
    grid = expand_grid(GRID)
    vocab_size = grid.base.family.vocab_size
    manifest = prepare("stdlib", None, vocab_size)
    specs = with_digests(grid.specs, {vocab_size: manifest.digest})
    sweep = SweepDir(folder / "sweep")
    if not sweep.plan_json.exists():
        Plan(
            "watch",
            "none",
            GRID,
            "2026-01-01T00:00:00Z",
            None,
            grid.base.family,
            grid.base.recipe.to_dict(),
            manifest,
            specs,
        ).write(sweep.plan_json)
    for i, spec in enumerate(specs):
        record = train(spec, sweep.run(spec.run_id))
        print(
            f"sweep {i + 1}/{len(specs)}: {spec.flops:.2g} FLOPs, {spec.steps} steps, loss {record.loss}", flush=True
        )
    runs = load_runs(sweep.path)
    return make_forecast(fit_law(runs, draws=200), runs, TARGET_FLOPS)


def main(argv: list[str]) -> None:
    """Train, watch, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sound", type=int, default=20, help="runs without a fault (default 20)")
    parser.add_argument("--faulty", type=int, default=10, help="runs of each fault (default 10)")
    parser.add_argument("--batch", type=int, default=0, help="which draw of seeds and onsets (default 0)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where the runs stay (default: nowhere)")
    parser.add_argument("--false-alarm", type=float, default=0.05, help="of a sound run (default .05)")
    args = parser.parse_args(argv)
    if args.sound < 0 or args.faulty < 0:
        raise InputError(f"--sound {args.sound}, --faulty {args.faulty}: must not be negative")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = args.keep or Path(name)
        forecast = sweep_and_forecast(folder)
        steps, limit = forecast.spec.steps, alarm_limit(forecast, args.false_alarm)
        print(
            f"target {forecast.spec.flops:.3g} FLOPs, {steps} steps, forecast {forecast.loss:.4f} {forecast.interval_90}"
        )
        rng = np.random.default_rng(args.batch)
        counted: dict[str, list[tuple[bool, bool, float]]] = {}
        plan = [("sound", i) for i in range(args.sound)]
        plan += [(kind, i) for i in range(args.faulty) for kind in ("rate", "shard", "half")]
        onsets = {key: int(steps * rng.uniform(0.2, 0.8)) for key in plan}
        for kind, i in plan:
            onset = steps if kind == "sound" else 0 if kind == "rate" else onsets[kind, i]
            fault = None if kind == "sound" else Fault(kind, onset)
            seed = 1000 * (args.batch + 1) + 100 * ("sound", "rate", "shard", "half").index(kind) + i
            spec = dataclasses.replace(forecast.spec, seed=seed, divergence_factor=10.0)
            rows = train_one(spec, folder / f"batch-{args.batch}" / f"{kind}-{i}", fault)
            state = assess(forecast, rows, args.false_alarm, limit)
            at = math.inf if state.alarm is None else (state.alarm.window + 1) / len(forecast.channels[0].mean)
            delay = at - onset / steps
            false = at <= onset / steps
            counted.setdefault(kind, []).append((not false and delay <= WITHIN + 1e-9, false and at < 1.01, delay))
            print(
                f"{kind} {i}: onset {onset / steps:.2f}, {state.alarm or 'no alarm'}, after {delay:.2f} of the run",
                flush=True,
            )
    rows_out = [
        (
            kind,
            str(len(found)),
            "–" if kind == "sound" else f"{sum(f for f, _, _ in found)} of {len(found)}",
            f"{sum(f for _, f, _ in found)}",
            "–" if kind == "sound" else f"{float(np.median([d for _, _, d in found])):.2f}",
        )
        for kind, found in counted.items()
    ]
    print("\n" + table([("runs", "number", "found within 10%", "false alarms", "median delay"), *rows_out]))


if __name__ == "__main__":
    run_command(main)
