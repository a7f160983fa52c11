"""What launching costs: planning and submitting 1,000 runs, reading their status, and 200 short runs beside their training time.

plan, submit   seconds of `scaling.sweep launcher=slurm sweep.wait=false` for a grid of 1,000, in jobs of about 30 s and in
               jobs of one run each, on a private SLURM (as root; left out where SLURM is not installed)
status         seconds of `scaling.status` on 1,000 finished runs
ratio          wall time of `scaling.sweep` on 200 runs of about half a second, over the sum of their time in the training
               loop divided by the cores: 1 means that launching costs nothing

python bench/launch.py [--runs 1000] [--short-runs 200] [--json -]   (a small corpus, vocabulary 300)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scaling.accounting import FLOPS_CONVENTIONS, PARAMS_CONVENTIONS, training_flops
from scaling.errors import InputError, run_command
from scaling.hardware import cpu_count
from scaling.records import RunRecord
from scaling.spec import RunSpec
from scaling.sweepdir import SweepDir
from scaling.text import table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))
from private_slurm import PrivateSlurm, missing  # noqa: E402
from slurm_sweeps import SETTINGS  # noqa: E402

SHORT_TOKENS = 12800


@dataclass(frozen=True)
class Seconds:
    """Of a command: by the clock, and of the processor (what the clock would say on a machine with nothing else to do)."""

    wall: float
    cpu: float


def timed(module: str, *words: str, environment: Mapping[str, str] | None = None) -> Seconds:
    """Run `python -m MODULE …`.

    Raises:
        InputError: it failed; with the end of what it said.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(f"{module} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Seconds(time.perf_counter() - start, cpu)


def submit(folder: Path, runs: int, job_minutes: float, cluster: PrivateSlurm) -> Seconds:
    """Time of planning and submitting `runs` runs, whose jobs then wait."""
    options = ["launcher=slurm", "sweep.wait=false", f"launcher.job_minutes={job_minutes}", "launcher.mem=500M"]
    options += ['launcher.sbatch={begin: "now+1hour"}', f"seed=range(0,{runs})", f"tokens={SHORT_TOKENS}"]
    seconds = timed("scaling.sweep", *SETTINGS, *options, f"sweep.dir={folder}", environment=cluster.environment)
    cluster.cancel_all()
    return seconds


def finished(spec: RunSpec) -> RunRecord:
    """A record as a finished run leaves it."""
    return RunRecord(
        run_id=spec.run_id,
        status="ok",
        spec=spec,
        params={name: spec.params.count(name) for name in PARAMS_CONVENTIONS},
        tokens=spec.tokens,
        flops={name: training_flops(spec.shape, spec.tokens, name) for name in FLOPS_CONVENTIONS},
        loss=3.0,
        bits_per_byte=1.5,
        train_loss=3.0,
        epochs=0.1,
        wall_s=0.5,
        train_s=0.4,
        tokens_per_s=1e4,
        mfu=None,
        attempts=1,
        device="cpu",
        threads=1,
        versions={},
        commit=None,
    )


def measure(runs: int, short_runs: int) -> dict[str, Any]:
    """The figures; those on SLURM None where it is not installed."""
    figures: dict[str, Any] = {"runs": runs, "short_runs": short_runs, "cores": cpu_count()}
    with tempfile.TemporaryDirectory(prefix="isoflop-launch-", ignore_cleanup_errors=True) as folder:
        short = SweepDir(Path(folder) / "short")
        words = [*SETTINGS, f"tokens={SHORT_TOKENS}", f"sweep.dir={short.path}"]
        timed("scaling.sweep", *words, f"seed={short_runs}")  # the corpus, once
        wall_s = timed("scaling.sweep", *words, f"seed=range(0,{short_runs})").wall
        trained_s = math.fsum(record.wall_s for record in short.records() if record.spec.seed < short_runs)
        figures |= {
            "short_run_s": trained_s / short_runs,
            "wall_s": wall_s,
            "ratio": wall_s / (trained_s / cpu_count()),
        }

        large = SweepDir(Path(folder) / "large")
        figures |= {"submit": None, "submit_single": None, "status": None}
        if missing() is None:
            cluster = PrivateSlurm(Path(folder) / "cluster")
            try:
                cluster.up()
                figures["submit"] = submit(large.path, runs, 0.5, cluster)
                figures["submit_single"] = submit(Path(folder) / "single", runs, 0.001, cluster)
            finally:
                cluster.down()
            for spec in large.plan().runs:
                finished(spec).write_once(large.run(spec.run_id).record_json)
            figures["status"] = timed("scaling.status", str(large.path))
    return figures


def describe(figures: dict[str, Any]) -> str:
    """A table for a reader."""

    def seconds(name: str) -> str:
        value = figures[name]
        return "no SLURM" if value is None else f"{value.wall:.1f} s ({value.cpu:.1f} s of CPU)"

    load = os.getloadavg()[0]
    rows = [
        ("what", "measured", "wanted"),
        (f"{figures['runs']} runs planned and submitted, several a job", seconds("submit"), "10 s"),
        (f"{figures['runs']} runs planned and submitted, one a job", seconds("submit_single"), "10 s"),
        (f"scaling.status on {figures['runs']} runs", seconds("status"), "1 s"),
        (
            f"{figures['short_runs']} runs of {figures['short_run_s']:.2f} s on {figures['cores']} cores, over their sum",
            f"{figures['ratio']:.2f}×",
            "1.3×",
        ),
    ]
    return f"{table(rows)}\nload average at the end: {load:.1f}"


def main(argv: list[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--short-runs", type=int, default=200)
    parser.add_argument("--json", choices=["-"])
    args = parser.parse_args(argv)
    figures = measure(args.runs, args.short_runs)
    print(json.dumps(figures, default=asdict) if args.json else describe(figures))


if __name__ == "__main__":
    run_command(main)
