"""The watch: residuals that are white, a threshold that keeps its word, faults found, verdicts written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.decide.alarm import alarm_limit, assess, innovations, statistic, step_responses, threshold
from analysis.decide.forecast import make_forecast
from analysis.decide.path import covariance, trace
from analysis.inference import fit_law
from analysis.laws.law import Floats
from analysis.runs import load_runs
from analysis.watch import main
from scaling.errors import InputError
from scaling.records import Channel, Forecast
from scaling.spec import RunSpec
from scaling.sweepdir import RunDir, SweepDir

SURFACE = {"E": 1.0, "A": 60.0, "B": 100.0, "alpha": 0.32, "beta": 0.30}
"""Of make_sweep."""


def rows_of(spec: RunSpec, seed: int, fault: Callable[[Floats, dict[str, Floats]], None] | None = None) -> list[Any]:
    """metrics.jsonl of a run on that surface: loss 4% above it until the learning rate falls, each step with its own noise."""
    rng = np.random.default_rng(seed)
    f = np.arange(1, spec.steps + 1) / spec.steps
    n = spec.params.body_head
    level = (
        SURFACE["E"] + SURFACE["A"] * n ** -SURFACE["alpha"] + SURFACE["B"] * (f * spec.tokens) ** -SURFACE["beta"]
    )
    level = level * np.exp(0.04 * np.clip((1 - f) / 0.2, 0, 1) + 0.002 * rng.standard_normal())
    columns = {"loss": level, "scatter": np.full(len(f), 0.03), "norm": 0.5 + 0.5 * f**-0.2}
    if fault is not None:
        fault(f, columns)
    loss = columns["loss"] * (1 + columns["scatter"] * rng.standard_normal(len(f)))
    norm = columns["norm"] * np.exp(0.1 * rng.standard_normal(len(f)))
    rows = [
        {"step": k + 1, "tokens": (k + 1) * spec.batch_tokens, "train_loss": float(loss[k]), "grad_norm": float(norm[k]),
         "tokens_per_s": 1e5}
        for k in range(spec.steps)
    ]  # fmt: skip
    for k in range(5):
        at = spec.steps * (k + 1) // 5 - 1
        rows[at]["val_loss"] = float(columns["loss"][at])
    return rows


@pytest.fixture
def forecast(make_sweep: Callable[..., Path]) -> Forecast:
    """Of a sweep whose runs have their metrics."""
    sweep = SweepDir(make_sweep(noise=0.002))
    for seed, spec in enumerate(sweep.plan().runs):
        text = "".join(json.dumps(row) + "\n" for row in rows_of(spec, seed))
        sweep.run(spec.run_id).metrics_jsonl.write_text(text)
    runs = load_runs(sweep.path)
    return make_forecast(fit_law(runs, "chinchilla", draws=50), runs, 3e12)


def test_the_path_is_sealed_with_the_forecast(forecast: Forecast, tmp_path: Path) -> None:
    assert [c.name for c in forecast.channels] == ["train_loss", "grad_norm", "scatter"]
    forecast.write(tmp_path / "forecast.json")
    assert Forecast.read(tmp_path / "forecast.json") == forecast
    content = json.loads((tmp_path / "forecast.json").read_text())
    content["channels"][0]["mean"][3] *= 1.01
    (tmp_path / "forecast.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="changed after it was sealed"):
        Forecast.read(tmp_path / "forecast.json")


def test_the_expected_path_is_the_truths(forecast: Forecast) -> None:
    seen = trace(forecast.spec, rows_of(forecast.spec, 100), len(forecast.channels[0].mean))
    off = seen.train_loss - np.array(forecast.channels[0].mean)
    assert np.abs(off[5:]).max() < 0.04
    by_window = {c.name: c for c in forecast.channels}
    assert np.abs(seen.grad_norm - np.array(by_window["grad_norm"].mean)).max() < 0.15


def channel(m: int) -> Channel:
    """A path of m windows that remembers ten and is least certain at the start."""
    return Channel("train_loss", [0.0] * m, [0.01] * m, list(np.linspace(0.1, 0, m)), 0.02, 10.0, 0.3)


def test_innovations_of_a_path_are_white() -> None:
    m = 40
    matrix = covariance(channel(m))[:-1, :-1]
    paths = np.random.default_rng(0).multivariate_normal(np.zeros(m), matrix, 2000)
    e = np.array([innovations(channel(m), path, np.arange(m)) for path in paths])
    assert e.std(0) == pytest.approx(np.ones(m), rel=0.08)
    assert np.abs(np.corrcoef(e.T) - np.eye(m)).max() < 0.12


def test_a_shift_leaves_its_response_in_the_innovations() -> None:
    m = 30
    path = np.where(np.arange(m) >= 12, 0.05, 0.0)
    e = innovations(channel(m), path, np.arange(m))
    responses = step_responses(channel(m), np.arange(m))
    assert e == pytest.approx(0.05 * responses[:, 12])
    height, onset = statistic(e[None], responses[None])
    assert onset[-1] == 12
    assert height[11] == pytest.approx(0)


@pytest.mark.parametrize("false_alarm", [0.02, 0.2])
def test_the_threshold_keeps_the_false_alarm_rate(false_alarm: float) -> None:
    responses = np.array([step_responses(channel(40), np.arange(40))] * 3)
    limit = threshold(responses, false_alarm)
    e = np.random.default_rng(1).standard_normal((3, 2000, 40))
    crossed = (statistic(e, responses)[0].max(-1) > limit).mean()
    assert 0.25 * false_alarm < crossed < 1.3 * false_alarm  # made for somewhat heavier tails


def test_one_wild_window_of_one_channel_is_no_alarm_and_a_shift_is() -> None:
    responses = np.array([step_responses(channel(40), np.arange(40))] * 3)
    limit = threshold(responses, 0.02)
    e = np.zeros((3, 40))
    e[1, 20] = 100.0
    assert statistic(e, responses)[0].max() < limit
    e[2, 20] = 100.0
    assert statistic(e, responses)[0].max() > limit


def test_sound_runs_raise_no_alarm_and_the_end_is_foreseen(forecast: Forecast) -> None:
    alarms, inside, limit = 0, 0, alarm_limit(forecast, 0.05)
    for seed in range(100, 120):
        rows = rows_of(forecast.spec, seed)
        state = assess(forecast, rows, limit=limit)
        alarms += state.alarm is not None
        early = assess(forecast, rows[: len(rows) // 3], limit=limit)
        inside += early.final_interval_90[0] < rows[-1]["val_loss"] < early.final_interval_90[1]
    assert alarms <= 3
    assert inside >= 16
    sealed = np.log(forecast.interval_90[1] / forecast.interval_90[0])
    assert np.log(early.final_interval_90[1] / early.final_interval_90[0]) < sealed * 1.05


def _higher_loss(f: Floats, columns: dict[str, Floats]) -> None:
    columns["loss"][f > 0.5] *= 1.06


def _half_the_batch(f: Floats, columns: dict[str, Floats]) -> None:
    columns["scatter"][f > 0.5] *= np.sqrt(2)
    columns["norm"][f > 0.5] *= np.sqrt(2)


@pytest.mark.parametrize(
    ("fault", "channels"), [(_higher_loss, {"train_loss"}), (_half_the_batch, {"grad_norm", "scatter"})]
)
def test_a_fault_is_found_within_a_tenth_of_the_run(
    forecast: Forecast, fault: Callable[[Floats, dict[str, Floats]], None], channels: set[str]
) -> None:
    for seed in range(5):
        alarm = assess(forecast, rows_of(forecast.spec, 200 + seed, fault)).alarm
        assert alarm is not None
        assert alarm.channel in channels
        assert alarm.direction == "above"
        assert 0.49 < (alarm.window + 1) / len(forecast.channels[0].mean) <= 0.6 + 1e-9
        assert 0.44 < alarm.onset / len(forecast.channels[0].mean) < 0.6


def test_before_a_window_is_full_the_sealed_forecast_stands(forecast: Forecast) -> None:
    state = assess(forecast, rows_of(forecast.spec, 1)[:2])
    assert (state.windows, state.alarm, state.final_loss) == (0, None, forecast.loss)


def start_run(forecast: Forecast, folder: Path, rows: list[Any]) -> RunDir:
    """A run's folder in progress, with its forecast."""
    run = RunDir(folder / "flagship")
    run.create(forecast.spec)
    forecast.write(run.path / "forecast.json")
    run.metrics_jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_command_writes_the_verdict_and_a_page(
    forecast: Forecast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(forecast.spec, 7, _higher_loss)
    run = start_run(forecast, tmp_path, rows[: int(0.65 * len(rows))])
    assert main([str(run.path), "--once", "--on-alarm", "stop", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert all(word in out for word in ("ALARM: training loss above", "heading for", "tokens/s", "left", "USD"))
    verdict = json.loads(run.verdict_json.read_text())
    assert verdict["action"] == "stop"
    assert "training loss above" in verdict["reason"]
    assert verdict["windows"] > verdict["window"]
    assert verdict["level"] > 1
    before = run.verdict_json.stat().st_mtime_ns
    assert main([str(run.path), "--once", "--on-alarm", "stop"]) == 1
    assert run.verdict_json.stat().st_mtime_ns == before  # told once: a run that goes on after it is left alone
    run.metrics_jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows[: int(0.7 * len(rows))]))
    assert main([str(run.path), "--once", "--on-alarm", "stop"]) == 1
    later = json.loads(run.verdict_json.read_text())
    assert later["windows"] > verdict["windows"]  # how it stands is told anew, of the same alarm
    assert [later[key] for key in ("action", "window")] == [verdict[key] for key in ("action", "window")]
    page = (run.path / "watch.html").read_text()
    assert 'http-equiv="refresh"' in page
    assert "polygon" in page
    assert "http://" not in page.replace("http-equiv", "")
    assert "https://" not in page


def test_a_sound_run_goes_on(forecast: Forecast, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(forecast.spec, 8)
    run = start_run(forecast, tmp_path, rows[: len(rows) // 2])
    assert main([str(run.path), "--once", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["action"] == "continue"
    assert json.loads(run.verdict_json.read_text())["action"] == "continue"


def test_what_cannot_be_watched_is_refused(forecast: Forecast, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no forecast at"):
        main([str(tmp_path / "nothing"), "--once"])
    run = start_run(forecast, tmp_path, [])
    with pytest.raises(InputError, match="--false-alarm 2"):
        main([str(run.path), "--once", "--false-alarm", "2"])
