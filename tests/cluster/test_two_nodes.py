"""One run on two nodes that have a network each: what one process trains, also when a rank is killed or the job requeued."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scaling.records import Forecast
from scaling.sweepdir import RunDir, SweepDir
from train.engine import checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from private_slurm import PrivateSlurm
from slurm_sweeps import PATIENCE_S, SLURM, Sweeps, finish, job_of, wait_for_mid_run, wait_until

GRID = ["model.width=16", "seed=0", "recipe.peak_lr=0.005", "launcher.mem=1500M"]
"""At the tests' usual learning rate two micro-batches of one process come to lie 4e-5 from one in 120 steps."""
TWO = ["launcher.nodes=2"]


def curve(sweep: SweepDir) -> list[float]:
    """Training loss by step of the sweep's one run."""
    (record,) = sweep.records()
    assert record.status == "ok"
    return [row["train_loss"] for row in sweep.run(record.run_id).metrics()]


@pytest.fixture(scope="module")
def by_one(netns_sweeps: Sweeps, tmp_path_factory: pytest.TempPathFactory) -> SweepDir:
    """The run, trained by one process of the sweep launcher."""
    sweep = SweepDir(tmp_path_factory.mktemp("alone") / "sweep")
    status, out, error = netns_sweeps.run(sweep, *GRID[:-1], local=True)
    assert status == 0, f"{out}\n{error}"
    return sweep


@pytest.fixture(scope="module")
def alone(by_one: SweepDir) -> list[float]:
    """Its losses."""
    return curve(by_one)


def test_a_run_on_two_nodes_is_that_of_one_process(netns_sweeps: Sweeps, sweep: SweepDir, alone: list[float]) -> None:
    finish(netns_sweeps.start(sweep, *GRID, *TWO))
    assert curve(sweep) == pytest.approx(alone, abs=1e-5)
    (record,) = sweep.records()
    attempts = list(sweep.run(record.run_id).attempts.glob("*/provenance.json"))  # several where the machine was slow
    assert {json.loads(path.read_text())["host"] for path in attempts} <= {"n1", "n2"}
    assert attempts
    (job,) = sweep.jobs.glob("*/0000")
    assert {path.name for path in job.glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}
    (checkpoint,) = sweep.run(record.run_id).checkpoints.iterdir()
    assert {path.name[:4] for path in checkpoint.glob("*.distcp")} == {"__0_", "__1_"}


def test_a_killed_rank_and_a_requeue(
    netns_sweeps: Sweeps, sweep: SweepDir, netns_cluster: PrivateSlurm, alone: list[float]
) -> None:
    launcher = netns_sweeps.start(sweep, *GRID, *TWO, behaviour={"all": "slow"})
    run = wait_for_mid_run(sweep, launcher)
    os.kill(int(run.holder() or 0), signal.SIGKILL)
    saved = checkpoint.newest(run.checkpoints)[0]
    wait_until(lambda: run.last_attempt() == 2 and checkpoint.newest(run.checkpoints)[0] > saved, "it did not go on")
    netns_cluster.command("scontrol", "requeue", job_of(run))
    finish(launcher)
    assert curve(sweep) == pytest.approx(alone, abs=1e-5)
    assert run.last_attempt() >= 3


def test_the_flagship_on_two_nodes_is_the_sweeps_run(
    netns_sweeps: Sweeps, by_one: SweepDir, alone: list[float], tmp_path: Path
) -> None:
    (spec,) = by_one.plan().runs
    forecast = Forecast(
        created="2026-01-01T00:00:00+00:00", sweep="sweep", run_ids=[], laws=[], convention={}, target_flops=spec.flops,
        n_params=1e4, n_tokens=1e5, spec=spec, loss=3.0, interval_50=(2.9, 3.1), interval_90=(2.8, 3.2), curve=[],
        extrapolation_ratio=2.0, extrapolation_colour="green", notes=[],
    )  # fmt: skip
    dataclasses.replace(forecast, seal=forecast.computed_seal()).write(tmp_path / "forecast.json")
    done = subprocess.run(
        [sys.executable, "-m", "train.flagship", f"forecast={tmp_path / 'forecast.json'}", *SLURM, *GRID[-1:], *TWO],
        cwd=Path(__file__).parents[2],
        env={**netns_sweeps.cluster.environment, "ISOFLOP_CACHE": str(netns_sweeps.cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert "flagship done" in done.stdout
    rows = RunDir(tmp_path / "flagship").metrics()
    assert [row["train_loss"] for row in rows] == pytest.approx(alone, abs=1e-5)
    assert {path.name for path in tmp_path.glob("flagship/slurm/jobs/*/0000/rank-*.log")} == {
        "rank-0.log",
        "rank-1.log",
    }
