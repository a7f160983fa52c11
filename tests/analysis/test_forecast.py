"""Allocation with exact FLOPs, and the sealed forecast: content, determinism, what may overwrite what."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis.decide import allocate, best_width, family_flops_per_token, make_forecast, write_forecast
from analysis.decide.forecast import CURVE_POINTS, extrapolation_colour
from analysis.inference import FitResult, fit_law
from analysis.inference.uncertainty import t_quantile
from analysis.laws import compute_optimal
from analysis.laws.surface import get_law
from analysis.runs import Runs, load_runs
from scaling.accounting import count_params, flops_per_token
from scaling.errors import InputError
from scaling.records import Forecast
from scaling.spec import RunSpec
from scaling.sweepdir import RunDir, SweepDir

SURFACE = {"E": 1.0, "A": 60.0, "B": 100.0, "alpha": 0.32, "beta": 0.30}
"""The surface of make_sweep."""


@pytest.fixture
def fitted(make_sweep: Callable[..., Path]) -> tuple[FitResult, Runs]:
    runs = load_runs(make_sweep(noise=0.002))
    return fit_law(runs, "chinchilla", draws=100), runs


def test_closed_form_and_exact_flops_agree_where_flops_are_6nd(fitted: tuple[FitResult, Runs]) -> None:
    fit, _ = fitted
    closed = compute_optimal(fit.parameters, 1e13)
    assert fit.allocate(1e13) == closed
    assert fit.allocate(1e13, lambda n: 6 * n) == pytest.approx(closed, rel=3e-3)
    n, d = allocate(fit, 1e13).n_params, allocate(fit, 1e13).n_tokens
    assert 6 * n * d == pytest.approx(1e13)


def test_a_familys_flops_are_the_accountings(fitted: tuple[FitResult, Runs]) -> None:
    fit, runs = fitted
    assert runs.plan is not None
    per_token = family_flops_per_token(runs.plan.family, "body_head")
    for width in (16, 48, 200):
        shape = runs.plan.family.shape(width)
        n = np.array([float(count_params(shape).body_head)])
        assert per_token(n)[0] == pytest.approx(flops_per_token(shape).train, rel=1e-3)
    a = allocate(fit, 1e13, runs.plan.family)
    assert per_token(np.array([a.n_params]))[0] * a.n_tokens == pytest.approx(1e13, rel=1e-6)


def test_the_best_width_is_no_worse_than_its_neighbours(fitted: tuple[FitResult, Runs]) -> None:
    fit, runs = fitted
    assert runs.plan is not None
    family = runs.plan.family
    width = best_width(fit, family, 1e13)

    def loss(w: int) -> float:
        shape = family.shape(w)
        return float(fit.predict(count_params(shape).body_head, 1e13 / flops_per_token(shape).train))

    assert loss(width) <= min(loss(width - 8), loss(width + 8))
    narrow = best_width(fit, family, 1e13, (20.0, 30.0))
    shape = family.shape(narrow)
    assert 20 <= 1e13 / flops_per_token(shape).train / count_params(shape).body_head <= 30


def test_the_flagship_has_the_sweeps_precision(make_sweep: Callable[..., Path]) -> None:
    runs = load_runs(make_sweep(precision="bf16"))
    assert make_forecast(fit_law(runs, "chinchilla", draws=20), runs, 1e13).spec.precision == "bf16"


def test_forecast_of_a_known_surface(fitted: tuple[FitResult, Runs]) -> None:
    fit, runs = fitted
    forecast = make_forecast(fit, runs, 1e13)
    assert runs.plan is not None
    assert forecast.seal == forecast.computed_seal()
    assert forecast.spec.flops == pytest.approx(1e13, rel=0.01)
    assert forecast.spec.data.digest == runs.plan.data.digest
    n, d = forecast.spec.params.body_head, forecast.spec.tokens
    actual = SURFACE["E"] + SURFACE["A"] * n ** -SURFACE["alpha"] + SURFACE["B"] * d ** -SURFACE["beta"]
    assert forecast.loss == pytest.approx(actual, rel=0.02)
    assert (
        forecast.interval_90[0]
        < forecast.interval_50[0]
        < forecast.loss
        < forecast.interval_50[1]
        < forecast.interval_90[1]
    )
    assert forecast.interval_90[0] <= actual <= forecast.interval_90[1]
    assert forecast.extrapolation_ratio == pytest.approx(10, rel=0.02)
    assert forecast.extrapolation_colour == "green"
    assert len(forecast.run_ids) == 19


def test_curve_band_ends_in_the_forecast_and_follows_the_runs(fitted: tuple[FitResult, Runs]) -> None:
    fit, runs = fitted
    forecast = make_forecast(fit, runs, 1e13)
    assert len(forecast.curve) == CURVE_POINTS
    last = forecast.curve[-1]
    assert last.tokens == forecast.spec.tokens
    assert (last.loss, *last.interval_90) == pytest.approx((forecast.loss, *forecast.interval_90))
    for point in forecast.curve[CURVE_POINTS // 4 :]:  # make_sweep's runs: loss(f) = final · f^−0.2
        at = forecast.loss * (point.tokens / last.tokens) ** -0.2
        assert point.loss == pytest.approx(at, rel=0.03)
        assert point.interval_90[0] < at < point.interval_90[1]
    assert forecast.channels == []  # evaluations alone say nothing of the steps between


def test_the_band_is_the_forecasts_on_the_way_and_takes_half_of_a_trend(make_sweep: Callable[..., Path]) -> None:
    """Runs whose loss lies above the surface at (N, f·D) by (1 − f)·.02·ln(N·D/1e10): the plane in ln N, ln D is exact."""
    path = make_sweep(noise=0.0)

    def lift(spec: RunSpec) -> float:
        return 0.02 * float(np.log(spec.params.body_head * spec.tokens / 1e10))

    def truth(spec: RunSpec, fraction: float) -> float:
        n, d = spec.params.body_head, fraction * spec.tokens
        return SURFACE["E"] + SURFACE["A"] * n ** -SURFACE["alpha"] + SURFACE["B"] * d ** -SURFACE["beta"]

    specs = [RunDir(p.parent).spec() for p in path.glob("runs/*/spec.json")]
    for spec in specs:
        rows = [
            {
                "step": k,
                "tokens": spec.tokens * k // 20,
                "val_loss": truth(spec, k / 20) * np.exp((1 - k / 20) * lift(spec)),
            }
            for k in range(1, 21)
        ]
        SweepDir(path).run(spec.run_id).metrics_jsonl.write_text("".join(json.dumps(r) + "\n" for r in rows))
    runs = load_runs(path)
    fit = fit_law(runs, "chinchilla", draws=100)
    forecast = make_forecast(fit, runs, 1e13)
    weight = np.array([spec.flops for spec in specs])
    mean = float(weight @ [lift(spec) for spec in specs] / weight.sum())
    n, full = forecast.spec.params.body_head, lift(forecast.spec)
    for k, point in enumerate(forecast.curve, 1):
        left = 1 - k / 20
        expected = np.log(truth(forecast.spec, k / 20)) + left * (mean + full) / 2
        assert np.log(point.loss) == pytest.approx(expected, abs=1e-3)
        trend = left * (full - mean)
        surface = float(fit.predictive_sd(n, point.tokens))
        sd = np.hypot(surface, trend / 12**0.5)
        half = np.log(point.interval_90[1] / point.interval_90[0]) / 2
        freedom = fit.freedom * (sd / surface) ** 4  # what the trend may add is not estimated
        assert half == pytest.approx(t_quantile(0.9, freedom) * sd, rel=0.05)


def test_the_band_has_the_noise_of_an_evaluation_once_and_that_of_the_windows_nowhere(
    make_sweep: Callable[..., Path],
) -> None:
    """Runs on the surface at (N, f·D) but for .5% at each of five evaluations, the last the run's own, and 5% at each step."""
    noise, rng = 0.005, np.random.default_rng(3)
    path = make_sweep(noise=0.0)
    for file in path.glob("runs/*/spec.json"):
        run = RunDir(file.parent)
        spec = run.spec()
        n, record = spec.params.body_head, run.record()
        assert record is not None
        rows = []
        for step in range(1, spec.steps + 1):
            surface = SURFACE["E"] + SURFACE["A"] * n ** -SURFACE["alpha"]
            surface += SURFACE["B"] * (step * spec.batch_tokens) ** -SURFACE["beta"]
            row = {"step": step, "tokens": step * spec.batch_tokens, "grad_norm": 1.0}
            row["train_loss"] = surface * np.exp(0.05 * rng.standard_normal())
            if step in {round(spec.steps * k / 5) for k in range(1, 6)}:
                row["val_loss"] = surface * np.exp(noise * rng.standard_normal())
            rows.append(row)
        run.metrics_jsonl.write_text("".join(json.dumps(r) + "\n" for r in rows))
        run.record_json.unlink()
        dataclasses.replace(record, loss=rows[-1]["val_loss"]).write_once(run.record_json)
    runs = load_runs(path)
    fit = fit_law(runs, "chinchilla", draws=100)
    forecast = make_forecast(fit, runs, 1e13)
    n = forecast.spec.params.body_head
    assert fit.run_noise == pytest.approx(noise, rel=0.4)
    for point in forecast.curve[4:]:  # from a fifth of the run on
        surface = float(fit.predictive_sd(n, point.tokens)) ** 2 - fit.run_noise**2
        freedom = (surface + noise**2) ** 2 / (surface**2 / fit.freedom + noise**4 / (len(runs) - 3))
        half = np.log(point.interval_90[1] / point.interval_90[0]) / 2
        assert half == pytest.approx(t_quantile(0.9, freedom) * np.sqrt(surface + noise**2), rel=0.35)


def test_no_curve_without_metrics(make_sweep: Callable[..., Path]) -> None:
    sweep = make_sweep()
    for path in sweep.glob("runs/*/metrics.jsonl"):
        path.unlink()
    runs = load_runs(sweep)
    forecast = make_forecast(fit_law(runs, draws=20), runs, 1e13)
    assert forecast.curve == []
    assert any("end point alone" in note for note in forecast.notes)


def test_notes_carry_warnings_and_a_corpus_too_small(fitted: tuple[FitResult, Runs]) -> None:
    fit, runs = fitted
    forecast = make_forecast(fit, runs, 1e17)
    assert forecast.extrapolation_colour == "red"
    assert any("read the corpus" in note for note in forecast.notes)


def test_a_red_forecast_is_warned_of(fitted: tuple[FitResult, Runs]) -> None:
    fit, runs = fitted
    assert not any("is red" in note for note in make_forecast(fit, runs, 1e13).notes)
    assert any("1e+03× the largest" in note and "is red" in note for note in make_forecast(fit, runs, 1e15).notes)


def test_every_member_is_in_the_forecast_and_says_what_it_is(make_sweep: Callable[..., Path], tmp_path: Path) -> None:
    runs = load_runs(make_sweep(noise=0.002))
    fit = fit_law(runs, draws=100)
    path = tmp_path / "forecast.json"
    laws = write_forecast(path, make_forecast(fit, runs, 1e13)).laws
    assert Forecast.read(path).laws == laws
    assert len(laws) == len(fit.ensemble.members) > 1
    assert sum(law["weight"] for law in laws) == pytest.approx(1)
    assert [law["weight"] for law in laws] == sorted((law["weight"] for law in laws), reverse=True)
    n, d = 1e5, 1e7
    each = [law["weight"] * np.log(get_law(law["name"]).predict(law["parameters"], n, d)) for law in laws]
    assert np.exp(sum(each)) == pytest.approx(float(fit.predict(n, d)))
    assert {law["emphasis"] for law in laws} == {0.0, 0.5, 1.0}


def test_a_law_asked_for_is_alone_in_the_forecast(fitted: tuple[FitResult, Runs]) -> None:
    fit, runs = fitted
    (law,) = make_forecast(fit, runs, 1e13).laws
    assert (law["name"], law["weight"], law["emphasis"], law["loss"]) == ("chinchilla", 1.0, None, "huber")
    assert law["parameters"] == pytest.approx(fit.parameters)


@pytest.mark.parametrize("counted", [{"flops": "6nd"}, {"loss_unit": "bits_per_byte"}])
def test_a_forecast_is_in_the_engines_units(make_sweep: Callable[..., Path], counted: dict[str, str]) -> None:
    sweep = make_sweep(noise=0.002)
    for path in sweep.glob("runs/*/record.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "bits_per_byte": record["loss"] / 2}))
    runs = load_runs(sweep, **counted)
    with pytest.raises(InputError, match="exact FLOPs and nats per token"):
        make_forecast(fit_law(runs, "chinchilla", draws=20), runs, 1e13)


def test_allocation_counts_as_the_runs_are_counted(make_sweep: Callable[..., Path]) -> None:
    sweep = make_sweep(noise=0.002)
    spent = {}
    for flops in ("exact", "full_attention", "6nd"):
        runs = load_runs(sweep, flops=flops)
        assert runs.plan is not None
        a = allocate(fit_law(runs, "chinchilla", draws=20), 1e13, runs.plan.family)
        spent[flops] = 1e13 / (a.n_params * a.n_tokens)
    assert spent["6nd"] == pytest.approx(6)
    assert spent["full_attention"] > spent["exact"] > 6


def test_colours() -> None:
    assert [extrapolation_colour(r) for r in (10, 30, 31, 300, 301)] == ["green", "green", "amber", "amber", "red"]


def test_equal_forecasts_are_kept_and_started_ones_protected(fitted: tuple[FitResult, Runs], tmp_path: Path) -> None:
    fit, runs = fitted
    path = tmp_path / "out" / "forecast.json"
    first = write_forecast(path, make_forecast(fit, runs, 1e13))
    content = path.read_bytes()
    later = dataclasses.replace(make_forecast(fit, runs, 1e13), created="2030-01-01T00:00:00+00:00")
    later = dataclasses.replace(later, seal=later.computed_seal())
    assert write_forecast(path, later) == first
    assert path.read_bytes() == content
    other = make_forecast(fit, runs, 5e12)
    assert write_forecast(path, other) == other  # not started: may be replaced
    run = RunDir(path.parent / "flagship")
    run.create(other.spec)
    lease = run.acquire()
    assert lease is not None
    with pytest.raises(InputError, match="was started"):
        write_forecast(path, first)
    assert Forecast.read(path) == other


def test_a_file_of_runs_has_no_shapes_to_forecast(tmp_path: Path, fitted: tuple[FitResult, Runs]) -> None:
    fit, runs = fitted
    with pytest.raises(InputError, match="not a sweep directory"):
        make_forecast(fit, dataclasses.replace(runs, plan=None), 1e13)
