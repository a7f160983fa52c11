"""The accounting's peak against torch's own account of allocations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scaling.accounting import training_bytes
from scaling.shape import ModelShape

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ModelShape(width=64, depth=2, n_heads=4, d_ff=176, vocab_size=512, seq_len=64)


def bench(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1"}
    )
    return done.stdout


def test_predicted_memory_is_what_torch_allocates() -> None:
    rows = [
        line.split("|")
        for line in bench("bench/memory.py", "--quick", "--tokens", "1024").splitlines()
        if line.startswith("| base")
    ]
    recompute = ("none", "selective", "full")
    assert [(row[2].strip(), row[3].strip()) for row in rows] == [(n, how) for n in "12" for how in recompute]
    assert [float(row[6]) for row in rows] == pytest.approx([1.0] * 6, abs=0.1)


def test_memory_grows_with_what_is_kept() -> None:
    def total(**change: object) -> int:
        return training_bytes(SHAPE, 4096, **change).total  # type: ignore[arg-type]

    assert total(recompute="full") < total(recompute="selective") < total()
    assert total(precision="bf16") < total() < total(accumulates=True)
    assert training_bytes(SHAPE, 1, "muon").total > training_bytes(SHAPE, 1, "muon").weights * 2.5
