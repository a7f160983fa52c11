"""What train.flagship refuses, alone and among ranks, and what it does when the watch beside it raises an alarm."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scaling.errors import InputError
from scaling.grid import make_run
from scaling.ranks import STOP_SIGNALS
from scaling.recipe import recipe_from_dict
from scaling.records import Channel, CurvePoint, DataManifest, Forecast
from scaling.shape import ShapeFamily
from scaling.spec import DataSpec, EvalSpec, OptimSpec, RunSpec, ScheduleSpec
from scaling.sweepdir import RunDir
from train.engine import checkpoint
from train.engine.parallel.world import World, device_of
from train.flagship import main

ROOT = Path(__file__).resolve().parents[2]


def write_forecast(
    folder: Path,
    ratio: float,
    spec: RunSpec | None = None,
    channels: tuple[Channel, ...] = (),
    limits: dict[str, object] | None = None,
) -> Path:
    """A sealed forecast of a small run, at `ratio` times the largest run's compute."""
    spec = spec or make_run(
        ShapeFamily(vocab_size=512, seq_len=32, depth=2, n_heads=2),
        16,
        flops=1e10,
        recipe=recipe_from_dict({"name": "steplaw"}),
        data=DataSpec("site", digest="0123456789abcdef"),
        optim=OptimSpec("muon", peak_lr=1e-3),
        schedule=ScheduleSpec("wsd", warmup_tokens=0),
        eval=EvalSpec(tokens=4096, points=2),
    )
    curve = [CurvePoint(spec.tokens * part // 4, 3.0, (2.9, 3.1), (2.8, 3.2)) for part in (1, 2, 3, 4)]
    forecast = Forecast(
        created="2026-01-01T00:00:00+00:00", sweep="sweep", run_ids=[], laws=[], convention={}, target_flops=1e10,
        n_params=1e4, n_tokens=1e5, spec=spec, loss=3.0, interval_50=(2.9, 3.1), interval_90=(2.8, 3.2), curve=curve,
        extrapolation_ratio=ratio, extrapolation_colour="red" if ratio > 300 else "green", notes=[],
        channels=list(channels), limits=limits or {},
    )  # fmt: skip
    path = folder / "forecast.json"
    dataclasses.replace(forecast, seal=forecast.computed_seal()).write(path)
    return path


def test_a_red_forecast_must_be_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_forecast(tmp_path, 1000.0)
    with pytest.raises(InputError, match=r"1e\+03× .* is red .*accept_extrapolation=true"):
        main([f"forecast={path}", "dry_run=true"])
    assert main([f"forecast={path}", "dry_run=true", "accept_extrapolation=true"]) == 0
    assert "1000.0× the largest run" in capsys.readouterr().out


def test_a_green_forecast_needs_no_word(tmp_path: Path) -> None:
    assert main([f"forecast={write_forecast(tmp_path, 20.0)}", "dry_run=true"]) == 0


def test_the_limits_of_a_forecast_are_sealed_and_kept_by_the_run(
    make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    spec = make_spec(steps=32)
    data = dataclasses.replace(spec.data, unique_tokens=2048, max_epochs=4.0)
    spec = dataclasses.replace(spec, data=data)
    path = write_forecast(tmp_path, 20.0, spec, limits={"unique_tokens": 2048.0, "max_epochs": 4.0})
    done = subprocess.run(
        [sys.executable, "-m", "train.flagship", f"forecast={path}", "run.threads=1"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "within unique_tokens 2048.0, max_epochs 4.0" in done.stdout
    record = RunDir(tmp_path / "flagship").record()
    assert record is not None
    assert (record.tokens, record.epochs) == (8192, 4.0)
    sealed = json.loads(path.read_text())
    sealed["limits"]["unique_tokens"] = 1e9
    path.write_text(json.dumps(sealed))
    with pytest.raises(InputError, match="changed after it was sealed"):
        main([f"forecast={path}", "dry_run=true"])


@pytest.fixture
def _own_signals() -> Iterator[None]:
    """The flagship takes over the stop signals of the process that it trains in: here they are given back."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_own_signals")
def test_another_text_than_the_sweeps_is_refused(
    make_spec: Callable[..., RunSpec], tmp_path: Path, manifest: DataManifest
) -> None:
    spec = make_spec(steps=12)
    path = write_forecast(tmp_path, 20.0, spec.with_digest("0123456789abcdef"))
    there = re.escape(f"data=text there: {manifest.digest} of 300 tokens")
    with pytest.raises(InputError, match=rf"trained on corpus 0123456789abcdef .*a vocabulary of 300.*{there}"):
        main([f"forecast={path}"])
    assert not (tmp_path / "flagship").exists()


@pytest.mark.usefixtures("_own_signals")
@pytest.mark.parametrize("name", ["tokenizer.json", "train.bin"])
def test_a_tokenizer_or_text_that_was_changed_in_place_is_refused(
    make_spec: Callable[..., RunSpec], tmp_path: Path, corpus_cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec = make_spec(steps=12)
    monkeypatch.setenv("ISOFLOP_CACHE", str(tmp_path / "cache"))
    copy = shutil.copytree(
        corpus_cache / "data" / str(spec.data.digest), tmp_path / "cache/data" / str(spec.data.digest)
    )
    content = bytearray((copy / name).read_bytes())
    content[-4] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(InputError, match=f"was changed: its tokenizer and tokens.*trained on {spec.data.digest}"):
        main([f"forecast={write_forecast(tmp_path, 20.0, spec)}"])
    assert not (tmp_path / "flagship").exists()


def test_a_watch_needs_a_path_to_watch(tmp_path: Path) -> None:
    path = write_forecast(tmp_path, 20.0)
    with pytest.raises(InputError, match="no path to watch"):
        main([f"forecast={path}", "on_alarm=stop"])
    with pytest.raises(InputError, match="on_alarm"):
        main([f"forecast={path}", "on_alarm=shout", "dry_run=true"])
    assert not (tmp_path / "flagship").exists()


def test_a_refusal_under_srun_ends_every_rank_at_once(tmp_path: Path) -> None:
    path = write_forecast(tmp_path, 1000.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "train.flagship", f"forecast={path}"],
            cwd=ROOT,
            env={**os.environ, **common, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=150)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], errors
    assert "is red (above 300×)" in errors[0]
    assert errors[1] == ""
    assert time.monotonic() - began < 120
    assert not (tmp_path / "flagship").exists()


@pytest.mark.parametrize(
    ("device", "shown", "taken"),
    [
        ("cuda", "5", "cuda:0"),
        ("cuda", "GPU-8f1c", "cuda:0"),
        ("cuda", "0,1,2,3", "cuda:3"),
        ("cuda", "", "cuda:3"),
        ("cpu", "5", "cpu"),
    ],
)
def test_the_gpu_of_a_rank(device: str, shown: str, taken: str) -> None:
    assert device_of(device, World(7, 8, 3), {"CUDA_VISIBLE_DEVICES": shown}) == taken
    assert device_of(device, World(7, 8, 3), {}) == ("cuda:3" if device == "cuda" else "cpu")
    assert device_of(device, None, {"CUDA_VISIBLE_DEVICES": shown}) == device


WINDOWS = 50
LONGEST_S = 600.0
"""Where the machine is busy."""
STEPS = {1: 20_000, 2: 5_000}
"""By processes: long enough for the watch to come up beside the run, and a window soon full where the machine is busy."""


def far_from_its_forecast(make_spec: Callable[..., RunSpec], folder: Path, steps: int) -> Path:
    """A sealed forecast of a long run whose training loss is expected to be far higher than it will be."""
    spec = make_spec(steps=steps)
    spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, max_epochs=1e6))
    far_too_high = Channel("train_loss", [math.log(20.0)] * WINDOWS, [0.05] * WINDOWS, [0.0] * WINDOWS, 0.0, 1.0, 1.0)
    return write_forecast(folder, 20.0, spec, (far_too_high,))


def flagship(path: Path, on_alarm: str, processes: int) -> subprocess.Popen[str]:
    """train.flagship with the watch beside it."""
    return subprocess.Popen(
        [sys.executable, "-m", "train.flagship", f"forecast={path}", f"on_alarm={on_alarm}", "run.threads=1",
         f"run.processes={processes}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_an_alarm_stops_the_run_with_a_checkpoint(
    make_spec: Callable[..., RunSpec], tmp_path: Path, processes: int
) -> None:
    process = flagship(far_from_its_forecast(make_spec, tmp_path, STEPS[processes]), "stop", processes)
    try:
        process.wait(LONGEST_S)
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=300)
    run = RunDir(tmp_path / "flagship")
    assert process.returncode == 130, errors + (run.path / "watch.log").read_text()
    assert errors.count("the watch asked for it: training loss below its forecast") == 1
    assert json.loads(run.verdict_json.read_text())["action"] == "stop"
    (newest, *_) = checkpoint.newest(run.checkpoints)
    assert f"stopped at step {int(newest.name[5:14])} of {STEPS[processes]}, checkpoint written" in errors
    assert run.metrics()[-1]["watch_action"] == "stop"
    assert run.record() is None
    assert not run.is_leased()


@pytest.mark.parametrize("processes", [1, 2])
def test_an_alarm_keeps_a_checkpoint_for_good_and_the_run_goes_on(
    make_spec: Callable[..., RunSpec], tmp_path: Path, processes: int
) -> None:
    process = flagship(far_from_its_forecast(make_spec, tmp_path, STEPS[processes]), "checkpoint", processes)
    run, deadline = RunDir(tmp_path / "flagship"), time.monotonic() + LONGEST_S
    try:
        asked: list[dict[str, object]] = []
        while not asked or run.metrics()[-1]["step"] < asked[0]["step"] + 5:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, (run.path / "watch.log").read_text()
            time.sleep(0.2)
            rows = run.metrics() if run.last_attempt() else []
            asked = [row for row in rows if row.get("watch_action") == "checkpoint"]
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "the watch asked for it" not in errors
    (kept,) = checkpoint.kept(
        run.checkpoints, STEPS[processes]
    )  # once, though the alarm stands at every window from there on
    state = checkpoint.load_first([kept])
    assert state is not None
    assert state["step"] == asked[0]["step"]
    assert state["run_id"] == run.spec().run_id
    assert str(asked[0]["watch_reason"]).startswith("training loss below its forecast")
    assert checkpoint.newest(run.checkpoints)[0] != kept  # what it wrote when it was told to end
