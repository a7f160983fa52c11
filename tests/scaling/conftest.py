"""A small corpus, and sweeps whose worker is a script of the tests' own."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scaling.grid import expand_grid
from scaling.launch import LocalLauncher, launch
from scaling.sweepdir import SweepDir

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's corpora are kept."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def settings() -> list[str]:
    """Three runs of 20 steps on a corpus of a few files."""
    files = Path(asyncio.__file__).parent / "*.py"
    return ["model=smoke", "data=text", f"data.path='{files}'", "tokens=1280", "batch_tokens=64", "seed=0,1,2"]


@pytest.fixture
def cli(cache: Path, tmp_path: Path) -> Run:
    """Run `python -m MODULE ARGS` in an empty folder."""

    def run(module: str, *args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "ISOFLOP_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
        return subprocess.run(
            [sys.executable, "-m", module, *args],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=300,
            **kwargs,
        )

    return run


@pytest.fixture
def sweep_with(
    cache: Path, tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, SweepDir]]:
    """Launch the three runs with the tests' worker; behaviours by seed ("raise", "kill", "diverge", "slow")."""

    def run(behaviour: dict[int, str] | None = None, *extra: str, workers: int = 2) -> tuple[int, SweepDir]:
        monkeypatch.setenv("ISOFLOP_CACHE", str(cache))
        monkeypatch.setenv("WORKER_BEHAVIOUR", json.dumps(behaviour or {}))
        sweep = SweepDir(tmp_path / "sweep")
        overrides = [*settings, *extra]
        status = launch(
            sweep,
            expand_grid(overrides),
            overrides,
            LocalLauncher(workers=workers),
            worker_command=[sys.executable, str(WORKER)],
        )
        return status, sweep

    return run
