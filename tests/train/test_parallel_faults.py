"""Two ranks that are stopped, killed, hung or refused: all end together, one says why, and the run goes on as if nothing was."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scaling.spec import RunSpec
from scaling.sweepdir import RunDir
from train.engine import checkpoint, train

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 150.0
"""For what takes some seconds on a quiet machine."""


def start(run: RunDir, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train.run", str(run.path), "--processes", "2", "--checkpoint-every", "0.1", *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks(process: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for pid in map(int, children):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found[int(next(v for v in variables if v.startswith(b"RANK=")).partition(b"=")[2])] = pid
    return found


def wait_for_progress(run: RunDir, process: subprocess.Popen[str]) -> int:
    """Until there is a newer checkpoint than there was: its step."""
    deadline, before = time.monotonic() + PATIENCE_S, checkpoint.newest(run.checkpoints)[:1]
    while checkpoint.newest(run.checkpoints)[:1] == before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)
    return int(checkpoint.newest(run.checkpoints)[0].name[5:14])


def test_hung_killed_and_stopped_ranks(make_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    spec = make_spec(steps=400)
    alone = train(spec, RunDir(tmp_path / "alone"))
    run = RunDir(tmp_path / "run")
    run.create(spec)

    hung = start(run, "--step-timeout", "10")
    wait_for_progress(run, hung)
    pids = ranks(hung)
    os.kill(pids[1], signal.SIGSTOP)
    while Path(f"/proc/{pids[0]}/stat").exists() and " Z " not in Path(f"/proc/{pids[0]}/stat").read_text():
        time.sleep(0.05)
    os.kill(pids[1], signal.SIGKILL)
    _, errors = hung.communicate(timeout=PATIENCE_S)
    assert hung.returncode != 0
    assert "Timeout (0:00:10)!" in errors
    assert "train/engine/" in errors.partition("Timeout (0:00:10)!")[2]  # the stack of the collective that waits

    killed = start(run)
    at = wait_for_progress(run, killed)
    os.kill(ranks(killed)[1], signal.SIGKILL)
    _, errors = killed.communicate(timeout=PATIENCE_S)
    assert killed.returncode != 0
    assert errors.count("error:") == 1
    assert "another rank ended without a word" in errors
    assert "rank 1 was killed by SIGKILL" in errors

    stopped = start(run, "--layout", "tensor=2")
    assert wait_for_progress(run, stopped) > at
    os.kill(ranks(stopped)[1], signal.SIGTERM)  # one rank alone hears of it
    _, errors = stopped.communicate(timeout=PATIENCE_S)
    assert stopped.returncode == 130, errors
    assert errors.count("checkpoint written") == 1

    record = train(spec, run)  # one process
    assert record.loss == pytest.approx(alone.loss, abs=2e-4)  # rounding of three layouts, grown over 400 steps
    assert record.attempts == 4
    rows = list(run.metrics())
    assert [row["step"] for row in rows] == list(range(1, 401))
    together = [row for row in rows if "comm_wait_s" in row]
    assert together[0] is rows[0]
    assert rows[-1] not in together
    assert all(0 < row["comm_wait_s"] < spec.batch_tokens / row["tokens_per_s"] for row in together)
    assert record.comm_wait_s == pytest.approx(sum(row["comm_wait_s"] for row in together), abs=1e-3)
    assert alone.comm_wait_s is None


def test_a_refusal_is_one_line(make_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create(make_spec())
    process = start(run, "--layout", "tensor=2,context=2")
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert len(errors.splitlines()) == 1
    assert "is of 4 ranks, there are 2" in errors


def test_ranks_of_other_code_or_libraries_are_one_error(make_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create(make_spec())
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import torch\ntorch.__version__ = '2.12.1+other'\n")
    for package in ("scaling", "train", "conf"):
        shutil.copytree(ROOT / package, tmp_path / "clone" / package)
    with open(tmp_path / "clone" / "train" / "model" / "layers.py", "a") as file:
        file.write("# a change that was not committed\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    own: list[tuple[Path, dict[str, str]]] = [
        (ROOT, {}),
        (ROOT, {"PYTHONPATH": str(tmp_path / "site")}),
        (tmp_path / "clone", {}),
    ]
    common = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "train.run", str(run.path)],
            cwd=folder,
            env={**os.environ, **common, "RANK": str(rank), **variables},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (folder, variables) in enumerate(own)
    ]
    errors = [process.communicate(timeout=PATIENCE_S)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2, 2], errors
    assert len(errors[0].splitlines()) == 1
    assert errors[1:] == ["", ""]
    assert f"rank 1 on {socket.gethostname()} has torch 2.12.1+other (rank 0: {torch.__version__})" in errors[0]
    assert f"rank 2 on {socket.gethostname()} has isoflop " in errors[0]
    assert run.record() is None
