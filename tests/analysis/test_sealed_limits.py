"""Forecasts sealed under limits: shape, tokens and loss keep them, and the seal covers them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import questions
from analysis.decide.allocate import allocate, flops_per_token_of
from analysis.decide.answer import answer
from analysis.decide.forecast import make_forecast
from analysis.decide.limits import WEIGHT_SHARE, Limits
from analysis.decide.optimum import Search
from analysis.fit import main
from analysis.inference import FitResult, fit_law
from analysis.postmortem import refit, with_flagship
from analysis.runs import Runs, load_runs
from analysis.show.text import answer_text
from scaling.accounting import PARAMS_CONVENTIONS, ParamCount, count_params, flops_per_token
from scaling.errors import InputError
from scaling.records import Forecast
from scaling.shape import Experts
from scaling.sweepdir import SweepDir

BUDGET = 1e13
SPARSE = Experts(n_experts=8, top_k=1, n_shared=1, granularity=2)


@pytest.fixture
def fitted(make_sweep: Callable[..., Path]) -> tuple[FitResult, Runs]:
    runs = load_runs(make_sweep())
    return fit_law(runs, "chinchilla", draws=30), runs


def test_the_command_seals_the_limits_with_the_forecast(
    make_sweep: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = ["--data", str(make_sweep()), "--law", "chinchilla", "--draws", "20", "--out", str(out)]
    limits = ["--unique-tokens", "2e6", "--max-epochs", "4", "--max-params", "1.5e5"]
    main([*argv, "--budget", str(BUDGET), *limits])
    forecast = Forecast.read(out / "forecast.json")
    assert forecast.limits == {
        "max_params": 1.5e5,
        "max_params_source": "--max-params",
        "unique_tokens": 2e6,
        "max_epochs": 4.0,
    }
    assert forecast.spec.params.body_head <= 1.5e5
    assert forecast.spec.data.unique_tokens == 2_000_000
    assert 3.9 < forecast.spec.tokens / 2e6 <= 4.0
    assert forecast.spec.data.max_epochs == pytest.approx(4, rel=0.03)
    text = capsys.readouterr().out
    assert "within --max-params (N at most 1.5e+05); --unique-tokens (2e+06); --max-epochs (4); sealed in" in text
    page = (out / "report.html").read_text()
    assert "--max-params (N at most 1.5e+05); --unique-tokens (2e+06); --max-epochs (4)" in page
    content = json.loads((out / "forecast.json").read_text())
    content["limits"]["max_epochs"] = 8.0
    (out / "forecast.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="changed after it was sealed"):
        Forecast.read(out / "forecast.json")


def test_without_limits_nothing_of_them_is_sealed(fitted: tuple[FitResult, Runs], tmp_path: Path) -> None:
    make_forecast(*fitted, BUDGET).write(tmp_path / "forecast.json")
    assert "limits" not in json.loads((tmp_path / "forecast.json").read_text())


def test_a_cap_on_n_that_does_not_bind_changes_nothing(fitted: tuple[FitResult, Runs]) -> None:
    free, capped = make_forecast(*fitted, BUDGET), make_forecast(*fitted, BUDGET, limits=Limits(max_params=1e9))
    assert capped.spec == free.spec
    assert capped.loss == free.loss


def test_the_widest_shape_under_a_cap_is_taken_and_the_budget_is_spent(fitted: tuple[FitResult, Runs]) -> None:
    fit, runs = fitted
    assert runs.plan is not None
    free = make_forecast(fit, runs, BUDGET)
    cap = free.spec.params.body_head / 2
    capped = make_forecast(fit, runs, BUDGET, limits=Limits(max_params=cap))
    width = capped.spec.shape.width
    assert capped.spec.params.body_head <= cap
    assert capped.spec.flops == pytest.approx(BUDGET, rel=0.01)
    assert capped.loss > free.loss
    assert count_params(runs.plan.family.shape(width + 8)).body_head > cap


def test_served_tokens_are_paid_from_the_budget(fitted: tuple[FitResult, Runs]) -> None:
    fit, runs = fitted
    free = make_forecast(fit, runs, BUDGET)
    served = 2.0 * free.spec.tokens
    forecast = make_forecast(fit, runs, BUDGET, limits=Limits(served_tokens=served))
    spec = forecast.spec
    assert spec.shape.width < free.spec.shape.width
    assert spec.flops + served * flops_per_token(spec.shape).train / 3 == pytest.approx(BUDGET, rel=0.01)
    assert forecast.target_flops == BUDGET
    assert forecast.extrapolation_ratio == pytest.approx(fit.extrapolation_ratio(spec.flops))


def test_repeated_text_is_forecast_at_its_worth_along_the_whole_curve(fitted: tuple[FitResult, Runs]) -> None:
    fit, runs = fitted
    limits = Limits(unique_tokens=1e6)
    forecast = make_forecast(fit, runs, BUDGET, limits=limits)
    spec = forecast.spec
    assert runs.plan is not None
    search = Search(fit, flops_per_token_of(fit, runs.plan.family), limits)
    n, d = search.worth(np.array(float(spec.params.body_head)), np.array(float(spec.tokens)))
    assert forecast.loss == pytest.approx(float(fit.predict(n, d)))
    assert forecast.loss > 1.01 * float(fit.predict(spec.params.body_head, spec.tokens))
    assert forecast.curve[-1].loss == pytest.approx(forecast.loss)
    assert spec.data.max_epochs >= spec.tokens / 1e6 > 2
    assert any("not measured in this sweep" in note for note in forecast.notes)
    assert not any("needs more text" in note for note in forecast.notes)


def test_the_postmortem_counts_repeated_text_at_its_worth(fitted: tuple[FitResult, Runs], tmp_path: Path) -> None:
    """A flagship whose loss is the one forecast lies on the law, so that the law with it is the law without it."""
    fit, runs = fitted
    forecast = make_forecast(fit, runs, BUDGET, limits=Limits(unique_tokens=3e5))
    spec, (record, *_) = forecast.spec, SweepDir(Path(runs.source)).records()
    params = {name: spec.params.count(name) for name in PARAMS_CONVENTIONS}
    flagship = dataclasses.replace(
        record, run_id=spec.run_id, spec=spec, params=params, tokens=spec.tokens, loss=forecast.loss,
        flops={**record.flops, "exact": spec.flops}, epochs=spec.tokens / 3e5,
    )  # fmt: skip
    before, _, outcome = refit(tmp_path, forecast, flagship, Path(runs.source))
    assert outcome.refit is not None
    assert outcome.refit.parameters == pytest.approx(before.parameters, rel=1e-3)
    as_fresh = fit_law(with_flagship(runs, flagship), "chinchilla", draws=2)
    assert as_fresh.parameters["B"] != pytest.approx(before.parameters["B"], rel=1e-2)


def test_more_text_than_the_corpus_has_is_no_limit_and_a_run_beyond_the_corpus_is_noted(
    fitted: tuple[FitResult, Runs],
) -> None:
    plenty = make_forecast(*fitted, BUDGET, limits=Limits(unique_tokens=1e9))
    assert plenty.spec == make_forecast(*fitted, BUDGET).spec
    beyond = make_forecast(*fitted, 1e17, limits=Limits(unique_tokens=1e12))
    assert any("read the corpus" in note for note in beyond.notes)


@pytest.mark.parametrize("limits", [Limits(tokens_per_param=100), Limits(overtrain=4)])
def test_a_ratio_is_kept_as_near_as_widths_permit(fitted: tuple[FitResult, Runs], limits: Limits) -> None:
    fit, runs = fitted
    assert runs.plan is not None
    best = allocate(fit, BUDGET, runs.plan.family, limits)
    forecast = make_forecast(fit, runs, BUDGET, limits=limits)
    spec = forecast.spec
    assert any("no width comes nearer" in note for note in forecast.notes)
    assert spec.tokens / spec.params.body_head == pytest.approx(best.n_tokens / best.n_params, rel=0.35)
    assert spec.flops == pytest.approx(BUDGET, rel=0.01)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(max_params=1e3, max_params_source="--max-params"), "--max-params: no shape .* the smallest, width 8"),
        (Limits(served_tokens=1e15), "--served-tokens"),
        (Limits(tokens_per_param=1, max_params=1e4, max_params_source="--serve-memory-gb"), "conflict"),
    ],
)
def test_limits_that_no_shape_keeps_are_refused(fitted: tuple[FitResult, Runs], limits: Limits, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_forecast(*fitted, BUDGET, limits=limits)


def limits_of(fit: FitResult, runs: Runs, *argv: str) -> Limits:
    """The flags as analysis.fit reads them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, nargs="+")
    questions.add_arguments(parser)
    args = parser.parse_args(argv)
    questions.check(args)
    return questions.limits(args, fit, runs)


def test_memory_bounds_all_experts_and_latency_those_that_a_token_meets(make_sweep: Callable[..., Path]) -> None:
    runs = load_runs(make_sweep(experts=SPARSE))
    fit = fit_law(runs, "chinchilla", draws=20)

    def params(*flags: str) -> ParamCount:
        return make_forecast(fit, runs, BUDGET, limits=limits_of(fit, runs, *flags)).spec.params

    free = params()
    memory = 0.5 * free.total / WEIGHT_SHARE * 2 / 1e9  # gigabytes of bf16
    held = params("--serve-memory-gb", str(memory))
    assert 0.3 * free.total < held.total <= 0.5 * free.total
    met = params("--max-active-params", str(0.5 * free.active("total")))
    assert 0.3 * free.active("total") < met.active("total") <= 0.5 * free.active("total")
    time_ms = 0.5 * free.active("total") * 2 / 3.35e12 * 1e3  # an H100 reads 3.35 TB/s
    assert params("--serve-ms-per-token", str(time_ms)) == met
    both = limits_of(fit, runs, "--serve-memory-gb", str(memory), "--max-active-params", "1e12")
    assert both.max_params_source == "--serve-memory-gb"  # the one that binds


def test_an_allocation_with_experts_says_how_many_parameters_there_are_and_how_many_a_token_meets(
    make_sweep: Callable[..., Path],
) -> None:
    runs = load_runs(make_sweep(experts=SPARSE))
    assert runs.plan is not None
    said = answer(fit_law(runs, "chinchilla", draws=20), runs, [BUDGET])
    (best,) = said.allocations
    assert best.held is not None
    total, met = best.held
    near = count_params(runs.plan.family.shape(48))
    assert met / total == pytest.approx(near.active("total") / near.total, rel=0.1)
    assert said.to_dict()["allocations"][0]["params_active"] == met
    assert "parameters in all, of which a token meets" in answer_text(said)


def test_limits_that_conflict_with_a_bound_on_experts_are_named(make_sweep: Callable[..., Path]) -> None:
    runs = load_runs(make_sweep(experts=SPARSE))
    fit = fit_law(runs, "chinchilla", draws=20)
    for flags in (("--serve-memory-gb", "1e-4"), ("--max-active-params", "2e4")):
        limits = limits_of(fit, runs, *flags, "--tokens-per-param", "5")
        with pytest.raises(InputError, match=f"--tokens-per-param and {flags[0]} conflict"):
            make_forecast(fit, runs, BUDGET, limits=limits)


def test_a_file_that_counts_active_parameters_alone_says_nothing_of_memory(tmp_path: Path) -> None:
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e11, 4)))
    frame = pd.DataFrame({"n_params_active": n, "n_tokens": d, "loss": 1.7 + 400 / n**0.34 + 410 / d**0.28})
    frame.to_csv(tmp_path / "runs.csv", index=False)
    runs = load_runs(tmp_path / "runs.csv", convention="active")
    fit = fit_law(runs, "chinchilla", draws=20)
    with pytest.raises(InputError, match="--serve-memory-gb and --convention active conflict"):
        limits_of(fit, runs, "--serve-memory-gb", "80")
    assert limits_of(fit, runs, "--serve-ms-per-token", "10").max_params == pytest.approx(0.01 * 3.35e12 / 2)
