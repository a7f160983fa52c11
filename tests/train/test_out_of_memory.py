"""Memory: what is refused before training, what the error says when it runs out, what recompute=budget chooses."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling.errors import InputError
from scaling.memory import DoesNotFit, Room, Settings, check_fits, choose_recompute, explain, nearest
from scaling.spec import EvalSpec, RunSpec
from scaling.sweepdir import RunDir
from tests.train.conftest import FAMILY
from train.engine import Host, train
from train.engine.memory import settle

BATCH = 32768
LOOP_BYTES = 100e6
"""Address space that the loop takes besides: late imports, threads, the corpus."""
LIMITED = """
import resource, sys
from pathlib import Path
import tokenizers, torch
import train.engine.loop, train.engine.evaluation
from scaling.errors import run_command
from scaling.sweepdir import RunDir
from train.run import main

torch.zeros(8).sum()
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[1]), resource.RLIM_INFINITY))
run_command(main, sys.argv[2:])
"""


@pytest.fixture
def large(make_spec: Callable[..., RunSpec]) -> RunSpec:
    """A narrow, deep run of one step, which takes some hundred megabytes and few FLOPs."""
    shape = dataclasses.replace(FAMILY.shape(16), depth=8)
    return make_spec(shape=shape, tokens=2 * BATCH, batch_tokens=BATCH, eval=EvalSpec(2048, points=1))


def limited(folder: Path, limit_bytes: float, *options: str) -> subprocess.CompletedProcess[str]:
    """train.run with so much address space beyond what the libraries take."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(int(limit_bytes)), str(folder), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_run_that_clearly_does_not_fit_is_refused_before_it_trains(large: RunSpec, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create(large)
    need = Settings(BATCH).step_bytes(large).total
    done = limited(run.path, need / 2, "--micro-batch-tokens", str(BATCH))
    assert done.returncode == 2, done.stderr
    (said,) = done.stderr.splitlines()
    assert "the address space limit (ulimit -v) is" in said
    assert f"a micro-batch of 32,768 tokens, recompute=none, 1 rank is predicted to take {need / 1e6:.0f} MB" in said
    assert "What fits: a micro-batch of 8,192 tokens" in said
    assert not any(run.attempts.glob("*/metrics.jsonl"))


def test_memory_that_runs_out_in_training_names_settings_that_then_train(large: RunSpec, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create(large)
    need = Settings(BATCH).step_bytes(large).total
    limit = 0.85 * need + LOOP_BYTES  # not clearly too little, before the loop has started
    done = limited(run.path, limit, "--micro-batch-tokens", str(BATCH))
    assert done.returncode == 2, done.stderr
    assert "out of memory: a step of run" in done.stderr.splitlines()[-1]
    offered = re.search(r"a micro-batch of ([\d,]+) tokens \(", done.stderr)
    assert offered is not None
    again = limited(run.path, limit, "--micro-batch-tokens", offered.group(1).replace(",", ""))
    assert again.returncode == 0, again.stderr
    record = run.record()
    assert record is not None
    assert record.loss == pytest.approx(train(large, RunDir(tmp_path / "plain"), Host()).loss, rel=1e-5)


def test_a_sweeps_worker_halves_the_micro_batch_of_what_it_refuses(large: RunSpec, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "sweep" / "runs" / large.run_id)
    run.create(large)
    need = Settings(BATCH).step_bytes(large).total
    options = ("--runs", large.run_id, "--micro-batch-tokens", str(BATCH))
    done = limited(Path("--sweep"), need / 2 + LOOP_BYTES, str(tmp_path / "sweep"), *options)
    assert done.returncode == 0, done.stderr
    failures = [json.loads(path.read_text()) for path in sorted(run.attempts.glob("*/failure.json"))]
    assert [failure["out_of_memory_at"] for failure in failures][:1] == [BATCH]
    assert all("DoesNotFit: out of memory: a step of run" in failure["reason"] for failure in failures)
    assert run.record() is not None


def test_what_is_offered_fits_and_is_the_nearest_that_does(large: RunSpec) -> None:
    now = Settings(BATCH)
    need = now.step_bytes(large).total
    for share in (0.9, 0.5, 0.2, 0.05):
        offers = nearest(large, now, share * need)
        assert offers
        assert all(other.step_bytes(large).total <= share * need for other in offers)
        for other in offers:
            if other.micro_batch_tokens < BATCH and other.shards == 1 and other.recompute == "none":
                doubled = dataclasses.replace(other, micro_batch_tokens=2 * other.micro_batch_tokens)
                assert doubled.step_bytes(large).total > share * need
    assert nearest(large, now, 1e3) == []
    assert "Nothing fits" in explain(large, now, Room(1e3, "a thimble"))
    check_fits(large, now, Room(need, "just enough"))
    with pytest.raises(DoesNotFit, match="half of it is"):
        check_fits(large, now, Room(need / 2, "half of it"))


def test_a_budget_chooses_the_least_recomputation_that_fits(large: RunSpec) -> None:
    now = Settings(BATCH)
    full = dataclasses.replace(now, recompute="full").step_bytes(large).total
    none = now.step_bytes(large).total
    budgets = [none - share * (none - full) for share in (0.0, 0.1, 0.3, 0.6, 1.0)]
    chosen = [choose_recompute(large, now, budget) for budget in budgets]
    assert all(s.step_bytes(large).total <= budget for s, budget in zip(chosen, budgets, strict=True))
    assert chosen[0].recompute == "none"
    again = [settings.recomputed_flops(large) for settings in chosen]
    assert again == sorted(again)
    assert any(settings.layers for settings in chosen)
    with pytest.raises(DoesNotFit, match="the memory budget is"):
        choose_recompute(large, now, 0.9 * full)


def test_a_budget_changes_no_bit_and_the_record_says_what_was_recomputed(
    large: RunSpec, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = dataclasses.replace(large, tokens=4 * 2048, batch_tokens=2048)
    plain = train(small, RunDir(tmp_path / "plain"), Host())
    half = Settings(2048, "full", layers=1).step_bytes(small).total
    for number, (budget, expected) in enumerate(((half, "full of the first 1"), (None, "none"))):
        host = Host(recompute="budget", memory_budget_bytes=budget, micro_batch_tokens=2048)
        record = train(small, RunDir(tmp_path / str(number)), host)
        assert record.recompute == expected
        assert record.loss == plain.loss
        assert record.train_loss == plain.train_loss
        assert f"run {small.run_id}: recompute={expected}: " in capfd.readouterr().err
    assert plain.recompute == "none"
    with pytest.raises(DoesNotFit):
        settle(small, Host(recompute="budget", memory_budget_bytes=1e5))
    with pytest.raises(InputError, match="with recompute=budget"):
        Host(recompute="full", memory_budget_bytes=1e9)
