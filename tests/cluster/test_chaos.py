"""Everything at once, for a bounded time: every run done once, with the loss that it has undisturbed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scaling.sweepdir import SweepDir

sys.path.insert(0, str(Path(__file__).parent))
from chaos import run_chaos, undisturbed
from slurm_sweeps import Sweeps


@pytest.mark.slow
def test_chaos(sweeps: Sweeps, tmp_path: Path) -> None:
    losses = undisturbed(sweeps, SweepDir(tmp_path / "undisturbed"))
    outcome = run_chaos(sweeps, SweepDir(tmp_path / "sweep"), losses, seed=0, accidents=6)
    print(outcome)
    assert outcome.done == outcome.same_loss == outcome.runs == 6
    assert outcome.duplicated == 0
    assert outcome.steps_again <= 0.05
