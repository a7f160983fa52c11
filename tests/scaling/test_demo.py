"""The demo: its commands, and its last table."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling.demo import Step, main, steps, summary
from scaling.errors import InputError
from scaling.files import write_json
from scaling.grid import expand_grid, read_grid
from scaling.records import Forecast

TARGET = read_grid("demo").target_flops or 0.0


def test_the_flagship_has_ten_times_the_grids_largest_run() -> None:
    assert 9.9 * max(spec.flops for spec in expand_grid(["+grid=demo"]).specs) <= TARGET


def test_budget_and_seed_scale_and_redraw_the_grid() -> None:
    sweep, fit, flagship, postmortem = (step.command for step in steps(Path("o"), 2 * TARGET, seed=1))
    assert sweep[1:] == ["+grid=demo", "sweep.dir=o/sweep", "sweep.compute_scale=2", "sweep.seed_offset=100"]
    assert fit[fit.index("--budget") + 1] == f"{2 * TARGET:g}"
    assert flagship == ["train.flagship", "forecast=o/forecast.json", "run.dir=o/flagship"]
    assert postmortem[1] == "o/flagship"
    top = max(spec.flops for spec in expand_grid(sweep[1:]).specs)
    assert abs(top / TARGET * 10 / 2 - 1) < 0.05


def test_a_step_is_through_when_its_outputs_are_newer_than_its_inputs(tmp_path: Path) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    step = Step(["command"], (source,), (made,))
    source.touch()
    assert not step.is_through()
    made.touch()
    assert step.is_through()
    os.utime(source, ns=(made.stat().st_mtime_ns + 1,) * 2)
    assert not step.is_through()
    assert not Step(["command"]).is_through()


def test_summary(tmp_path: Path) -> None:
    spec = expand_grid(["+grid=demo"]).specs[-1]
    forecast = Forecast(
        created="2026-01-01T00:00:00Z", sweep="s", run_ids=[], laws=[], convention={}, target_flops=1e13, n_params=1e5,
        n_tokens=1e7, spec=spec, loss=2.5, interval_50=(2.4, 2.6), interval_90=(2.2, 2.8), curve=[],
        extrapolation_ratio=10.0, extrapolation_colour="green", notes=[],
    )  # fmt: skip
    dataclasses.replace(forecast, seal=forecast.computed_seal()).write(tmp_path / "forecast.json")
    write_json(
        tmp_path / "postmortem.json",
        {"forecast_loss": 2.5, "actual_loss": 2.525, "relative_error": 0.01, "inside_50": True, "inside_90": True,
         "extrapolation_ratio": 10.0, "seal_ok": True},
    )  # fmt: skip
    text = summary(tmp_path)
    assert "+1.00%" in text
    assert "2.2000 to 2.8000   (inside)" in text


@pytest.mark.parametrize("args", [["--budget", "-1"], ["--seed", "-1"]])
def test_bad_input(args: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        main([*args, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_failing_step_stops_the_demo(cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = cli("scaling.demo", "--out", "out", "model.width=13")
    assert done.returncode == 2
    assert done.stdout.count("$ python -m") == 1
    assert "not divisible" in done.stderr
