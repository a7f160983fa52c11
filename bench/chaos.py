"""Sweeps on a private two-node SLURM under random accidents: what share of the runs is done, how often, at what cost.

Accidents, in random order some seconds apart: slurmctld or a slurmd killed (kill -9, its steps alive), a job sent SIGTERM
or requeued, a worker killed, the launcher killed and started again. Each seed is six runs of 120 steps.
again: steps done more than once over the sweep's steps; same: final losses equal, to the bit, to the undisturbed runs'.

python bench/chaos.py [--seeds 0 1 2] [--accidents 12] [--json -]   (as root, with slurmctld, slurmd, slurm-client, munge)
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from scaling.errors import InputError, run_command
from scaling.sweepdir import SweepDir
from scaling.text import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cluster"))
from chaos import Outcome, run_chaos, undisturbed
from private_slurm import PrivateSlurm, missing
from slurm_sweeps import Sweeps


def measure(seeds: list[int], accidents: int) -> dict[int, Outcome]:
    """The outcome of each seed, on a cluster of its own."""
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="isoflop-chaos-", ignore_cleanup_errors=True) as folder:
        for seed in seeds:
            cluster = PrivateSlurm(Path(folder) / f"cluster-{seed}")
            sweeps = Sweeps(cluster, Path(folder) / "cache")
            try:
                cluster.up()
                losses = undisturbed(sweeps, SweepDir(Path(folder) / "undisturbed"))
                sweep = SweepDir(Path(folder) / f"sweep-{seed}")
                outcomes[seed] = run_chaos(sweeps, sweep, losses, seed, accidents)
            finally:
                cluster.down()
    return outcomes


def describe(outcomes: dict[int, Outcome]) -> str:
    """A table for a reader."""
    heading = ("seed", "runs", "done", "lost", "duplicated", "same", "again", "time", "accidents")
    rows = [
        (
            str(seed), str(o.runs), str(o.done), str(o.runs - o.done), str(o.duplicated), str(o.same_loss),
            f"{o.steps_again:.1%}", f"{o.wall_s:.0f} s", ", ".join(f"{n} {name}" for name, n in o.events.items()),
        )
        for seed, o in outcomes.items()
    ]  # fmt: skip
    return table([heading, *rows])


def main(argv: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--accidents", type=int, default=12)
    parser.add_argument("--json", choices=["-"])
    args = parser.parse_args(argv)
    if reason := missing():
        raise InputError(reason)
    outcomes = measure(args.seeds, args.accidents)
    print(json.dumps({s: asdict(o) for s, o in outcomes.items()}) if args.json else describe(outcomes))


if __name__ == "__main__":
    run_command(main)
