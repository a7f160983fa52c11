"""FLOPs that trunk and branches save over separate runs, and what they change in the losses.

Apart: every length trained from its first step. Together: the longest is trained, the others cool down from its
checkpoints (sweep.branches=true). Both are trained here, in this process, one run after another, and counted by their
records. Then, length by length:
  difference   final loss of the branch less that of its separate twin: same seed, same settings
  seed sd      of the twins over seeds: the noise that a difference would have to be seen in
  own recipe   mean loss of separate runs with the recipe's learning rate and batch at their own length, less that of
               the twins, which have the trunk's: below zero is what sharing one setting costs, ± standard error

python bench/branching.py [--width 16] [--tokens-per-param 1.25] [--trunk-length 3] [--seeds 3]
(model=demo on data=stdlib; 3 minutes of one core)
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from scaling.branches import with_digests
from scaling.errors import InputError, run_command
from scaling.grid import expand_grid
from scaling.records import RunRecord
from scaling.spec import RunSpec
from scaling.sweepdir import RunDir
from scaling.text import table
from train.data.shards import prepare
from train.engine import train

LENGTHS = {"equal": (1, 2, 3, 4), "doubling": (1, 2, 4, 8)}
"""Multiples of the shortest run."""
Records = dict[tuple[int, int], RunRecord]
"""By length and seed."""


def plan(lengths: Sequence[int], args: argparse.Namespace, *settings: str) -> list[RunSpec]:
    """The runs of these lengths and seeds, trunks before their branches."""
    ratios = ",".join(f"{args.tokens_per_param * length:g}" for length in lengths)
    grid = ["model=demo", "data=stdlib", "eval.points=1", f"model.width={args.width}"]
    grid.append(f"sweep.trunk_tokens_per_param={args.trunk_length * args.tokens_per_param:g}")
    seeds = ",".join(map(str, range(args.seeds)))
    specs = expand_grid([*grid, f"tokens_per_param={ratios}", f"seed={seeds}", *settings]).specs
    vocab_size = specs[0].shape.vocab_size
    digest = prepare("stdlib", None, vocab_size, progress=False).digest
    return sorted(with_digests(specs, {vocab_size: digest}), key=lambda spec: -spec.tokens)


def train_all(specs: list[RunSpec], lengths: Sequence[int], folder: Path) -> Records:
    """Train the runs into a folder."""
    by_tokens = dict(zip(sorted({spec.tokens for spec in specs}), sorted(lengths), strict=True))
    records = {}
    for spec in specs:
        record = train(spec, RunDir(folder / spec.run_id))
        if record.loss is None:
            raise InputError(f"run of {spec.tokens} tokens {record.status}: {record.reason}")
        records[by_tokens[spec.tokens], spec.seed] = record
        print(f"{folder.name} {spec.tokens:,} tokens seed {spec.seed}: {record.loss:.6f}, {record.wall_s:.1f} s")
    return records


def losses(records: Records, length: int, seeds: int) -> list[float]:
    """Final losses of one length by seed."""
    return [records[length, seed].loss or math.nan for seed in range(seeds)]


def loss_row(kind: str, length: int, seeds: int, together: Records, twins: Records, own: Records) -> tuple[str, ...]:
    """One length's line of the table of losses."""
    branch, twin, tuned = (losses(records, length, seeds) for records in (together, twins, own))
    differences = [b - t for b, t in zip(branch, twin, strict=True)]
    error = math.hypot(statistics.stdev(tuned), statistics.stdev(twin)) / math.sqrt(seeds)
    return (
        kind,
        f"{twins[length, 0].tokens:,}",
        f"{statistics.fmean(branch):.6f}",
        f"{statistics.fmean(twin):.6f}",
        f"{max(differences, key=abs):.2g}",
        f"{statistics.stdev(twin):.4f}",
        f"{statistics.fmean(tuned) - statistics.fmean(twin):+.4f} ± {error:.4f}",
    )


def size_row(kind: str, together: Records, twins: Records) -> tuple[str, ...]:
    """One grid's line of the table of FLOPs."""
    apart = [twins[key] for key in together]
    flops = [math.fsum(record.bought_flops for record in records) for records in (apart, together.values())]
    return (
        f"{kind} {','.join(map(str, LENGTHS[kind]))}",
        str(len(apart)),
        *(f"{total / len(apart):.4g}" for total in flops),
        f"{flops[0] / flops[1]:.3f}",
    )


def main(argv: list[str]) -> None:
    """Train both ways and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=16, help="of model=demo (default 16)")
    parser.add_argument("--tokens-per-param", type=float, default=1.25, help="D/N of the shortest run (default 1.25)")
    parser.add_argument(
        "--trunk-length",
        type=float,
        default=3.0,
        help="multiple of it at which a trunk's recipe is asked (default 3)",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of every length (default 3)")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        raise InputError(f"--seeds {args.seeds}: seed noise needs at least 2")
    torch.set_num_threads(1)
    every = sorted({length for lengths in LENGTHS.values() for length in lengths})
    joined = {kind: plan(lengths, args, "sweep.branches=true") for kind, lengths in LENGTHS.items()}
    apart = {
        spec.run_id: dataclasses.replace(spec, parent_run_id=None, parent_step=None, keep_steps=())
        for specs in joined.values()
        for spec in specs
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        twins = train_all(list(apart.values()), every, folder / "apart")
        together = {kind: train_all(joined[kind], LENGTHS[kind], folder / kind) for kind in LENGTHS}
        own = train_all(plan(every, args), every, folder / "own-recipe")
    heading = ("lengths", "D", "branch", "twin", "difference", "seed sd", "own recipe")
    rows = [
        loss_row(kind, length, args.seeds, together[kind], twins, own)
        for kind, lengths in LENGTHS.items()
        for length in lengths
    ]
    print(f"\n{table([heading, *rows])}\ndifference: the largest over {args.seeds} seeds\n")
    sizes = ("lengths", "points", "FLOPs a point apart", "together", "ratio")
    print(table([sizes, *(size_row(kind, together[kind], twins) for kind in LENGTHS)]))


if __name__ == "__main__":
    run_command(main)
