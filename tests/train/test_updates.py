"""How far an update moves each group of parameters, as metrics.jsonl says it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling.spec import RunSpec
from scaling.sweepdir import RunDir
from train.data.shards import Corpus
from train.engine import Host, train
from train.engine.optim import GROUPS, group_of
from train.engine.trainer import Trainer
from train.model.decoder import Decoder


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_update_ratios_are_what_the_weights_moved_by(
    optim: str, make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    """Against the weights before and after, without weight decay; logged every tenth step, without moving any loss."""
    spec = make_spec(steps=25, optim=optim, weight_decay=0.0)
    trainer = Trainer(spec, Corpus.open(str(spec.data.digest)), Host())
    assert isinstance(trainer.model, Decoder)
    for step in range(10):
        before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        row = trainer.step(*trainer.loader.batch(step))
    moved: dict[str, list[float]] = {}
    for name, weight in trainer.model.state_dict().items():
        sums = moved.setdefault(group_of(name, weight), [0.0, 0.0])
        sums[0] += float((weight - before[name]).double().square().sum())
        sums[1] += float(weight.double().square().sum())
    found = {name.removeprefix("update_ratio_"): row[name] for name in row if name.startswith("update_ratio_")}
    assert found.keys() == moved.keys() == set(GROUPS)
    for name, (update, weight_squares) in moved.items():
        assert found[name] == pytest.approx((update / weight_squares) ** 0.5, rel=2e-4)
    run = RunDir(tmp_path / "run")
    train(spec, run, Host())
    assert [row["step"] for row in run.metrics() if "update_ratio_layers" in row] == [10, 20]
    assert run.metrics()[9]["update_ratio_head"] == found["head"]


def test_two_ranks_measure_the_same(make_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    runs = [RunDir(tmp_path / name) for name in ("one", "two")]
    spec = make_spec(steps=12)
    for run in runs:
        run.create(spec)
    train(spec, runs[0], Host())
    done = subprocess.run(
        [sys.executable, "-m", "train.run", str(runs[1].path), "--processes", "2"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    one, two = (run.metrics()[9] for run in runs)
    for name in GROUPS:
        assert two[f"update_ratio_{name}"] == pytest.approx(one[f"update_ratio_{name}"], rel=1e-3)
