"""Allocation under limits: published cases, the conditions of an optimum, what is refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import questions
from analysis.decide.allocate import allocate, cheapest_within
from analysis.decide.answer import answer
from analysis.decide.limits import NONE, WEIGHT_SHARE, Limits
from analysis.decide.optimum import R_TOKENS, Search
from analysis.inference import FitResult, fit_law
from analysis.laws import PUBLISHED, get_law
from analysis.laws.law import Floats
from analysis.runs import Runs, load_runs
from scaling.errors import InputError

HOFFMANN = next(law for law in PUBLISHED if law.name == "Hoffmann et al. 2022")


@pytest.fixture(scope="module")
def hoffmann(tmp_path_factory: pytest.TempPathFactory) -> tuple[FitResult, Runs]:
    """Chinchilla's surface as a fit: 45 runs on it, to a tenth of a percent."""
    budgets, ratios = np.meshgrid(np.geomspace(1e18, 1e22, 5), np.geomspace(1 / 8, 8, 9))
    n = (np.sqrt(budgets / 6 / 20) * ratios).ravel()
    d = budgets.ravel() / 6 / n
    noise = np.exp(1e-4 * np.random.default_rng(0).standard_normal(n.size))
    loss = get_law("chinchilla").predict(HOFFMANN.parameters, n, d) * noise
    path = tmp_path_factory.mktemp("hoffmann") / "runs.csv"
    pd.DataFrame({"n_params": n, "n_tokens": d, "loss": loss}).to_csv(path, index=False)
    runs = load_runs(path)
    return fit_law(runs, "chinchilla", draws=100), runs


def options(*argv: str) -> argparse.Namespace:
    """The flags as analysis.fit reads them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", type=float, nargs="+")
    questions.add_arguments(parser)
    args = parser.parse_args(argv)
    questions.check(args)
    return args


def test_the_epoch_surface_at_1e24(golden: Path, tmp_path: Path) -> None:
    """Epoch AI's refit of Chinchilla's runs: 97.2B parameters on 1.715T tokens."""
    frame = pd.read_csv(golden / "epoch_svg" / "points.csv")
    frame.drop(frame["loss"].nlargest(5).index).to_csv(tmp_path / "runs.csv", index=False)
    fit = fit_law(load_runs(tmp_path / "runs.csv"), "chinchilla", draws=200)
    a = allocate(fit, 1e24)
    assert a.n_params == pytest.approx(97.2e9, rel=2e-3)
    assert a.n_tokens == pytest.approx(1.715e12, rel=2e-3)
    assert a.sureness.n_interval[0] < 0.9 * a.n_params < 1.1 * a.n_params < a.sureness.n_interval[1]  # type: ignore[operator]
    assert a.sureness.flat[0] < a.n_params < a.sureness.flat[1]


def test_llama_3_and_deepseek_v3_in_hours_and_flops() -> None:
    """Llama 3: 30.84M H100-hours at 34.6% are 3.8e25 FLOPs; DeepSeek-V3: 2.664M hours at 34.7% are 6 × 37B × 14.8T."""
    llama = questions.budgets(options("--gpu-hours", "30.84e6", "--mfu", ".346"), 0)[0]
    assert llama == pytest.approx(3.8e25, rel=0.01)
    deepseek = questions.budgets(options("--gpu-hours", "2.664e6", "--mfu", ".3466"), 0)[0]
    assert deepseek == pytest.approx(6 * 37e9 * 14.8e12, rel=2e-3)
    rented = questions.budgets(options("--usd", "5.328e6", "--usd-per-hour", "2", "--mfu", ".3466"), 0)[0]
    assert rented == pytest.approx(deepseek)


def test_serving_makes_the_model_smaller_as_sardana_found(hoffmann: tuple[FitResult, Runs]) -> None:
    """Figure 1 of arXiv 2401.00448: 13B's quality with 2T tokens served is had 17% cheaper (1.7e22 FLOPs) near 7B."""
    fit, _ = hoffmann
    compute = next(c for c in np.geomspace(1e21, 1e24, 2000) if fit.allocate(c)[0] >= 13e9)
    n, d = fit.allocate(float(compute))
    quality = float(fit.predict(n, d))
    found = cheapest_within(fit, quality, 1e18, limits=Limits(served_tokens=2e12))
    before = 6 * n * d + 2 * n * 2e12
    assert found.n_params == pytest.approx(7e9, rel=0.15)
    assert before - found.budget_flops == pytest.approx(1.7e22, rel=0.15)
    assert 1 - found.budget_flops / before == pytest.approx(0.17, abs=0.02)


@pytest.mark.parametrize("served", [1e11, 2e12, 3e13])
def test_the_condition_of_the_inference_aware_optimum(hoffmann: tuple[FitResult, Runs], served: float) -> None:
    """(αA/N^α)/(βB/D^β) = 1 + D_inf/(3D) (Sardana et al. 2023), and the budget is spent to the last FLOP."""
    fit, _ = hoffmann
    p = fit.parameters
    n, d = Search(fit, limits=Limits(served_tokens=served)).best(1e24)
    ratio = p["alpha"] * p["A"] * n ** -p["alpha"] / (p["beta"] * p["B"] * d ** -p["beta"])
    assert ratio == pytest.approx(1 + served / (3 * d), rel=2e-3)
    assert 6 * n * d + 2 * n * served == pytest.approx(1e24)


def test_serving_in_money_shrinks_the_model_further(hoffmann: tuple[FitResult, Runs]) -> None:
    fit, runs = hoffmann
    flags = ("--served-tokens", "2e12")
    in_flops = questions.limits(options(*flags), fit, runs)
    in_money = questions.limits(options(*flags, "--mfu", ".4", "--serve-mfu", ".05"), fit, runs)
    assert in_money.serving_weight == pytest.approx(8)
    assert allocate(fit, 1e23, limits=in_money).n_params < 0.7 * allocate(fit, 1e23, limits=in_flops).n_params


def test_a_cap_that_does_not_bind_changes_nothing(hoffmann: tuple[FitResult, Runs]) -> None:
    fit, _ = hoffmann
    free, capped = allocate(fit, 1e22), allocate(fit, 1e22, limits=Limits(max_params=1e12))
    assert capped.n_params == pytest.approx(free.n_params, rel=5e-3)
    assert capped.loss == pytest.approx(free.loss, rel=1e-6)


def test_serving_memory_and_latency_cap_n(hoffmann: tuple[FitResult, Runs]) -> None:
    fit, runs = hoffmann
    memory = questions.limits(options("--serve-memory-gb", "80"), fit, runs)
    assert memory.max_params == pytest.approx(WEIGHT_SHARE * 40e9)
    latency = questions.limits(options("--serve-ms-per-token", "10", "--serve-memory-gb", "80"), fit, runs)
    assert latency.max_params_source == "--serve-ms-per-token"
    assert latency.max_params == pytest.approx(0.01 * 3.35e12 / 2)
    a = allocate(fit, 1e25, limits=latency)
    assert a.n_params == pytest.approx(latency.max_params, rel=1e-6)
    assert 6 * a.n_params * a.n_tokens == pytest.approx(1e25)
    assert a.unlimited is not None
    assert a.loss > a.unlimited[2]


def test_repeated_tokens_are_worth_less(hoffmann: tuple[FitResult, Runs]) -> None:
    fit, _ = hoffmann
    unique = 1e10
    search = Search(fit, limits=Limits(unique_tokens=unique))
    _, worth = search.worth(np.array(1e9), np.array([unique, 4 * unique, 1e3 * unique]))
    assert worth[0] == pytest.approx(unique)
    assert 3.6 * unique < worth[1] < 4 * unique
    assert worth[2] == pytest.approx(unique * (1 + R_TOKENS), rel=1e-3)
    n, d = fit.allocate(1e21)
    assert float(search.loss(np.array(n), np.array(d))) > float(fit.predict(n, d))
    plenty = allocate(fit, 1e21, limits=Limits(unique_tokens=1e13))
    assert plenty.loss == pytest.approx(allocate(fit, 1e21).loss, rel=1e-6)
    few = allocate(fit, 1e21, limits=Limits(unique_tokens=1e9, max_epochs=4))
    assert few.n_tokens <= 4e9 * (1 + 1e-9)
    assert few.epochs == pytest.approx(4)


def test_overtraining_is_on_its_ray(hoffmann: tuple[FitResult, Runs]) -> None:
    fit, _ = hoffmann
    free = allocate(fit, 1e22)
    over = allocate(fit, 1e22, limits=Limits(overtrain=5))
    assert over.n_tokens / over.n_params == pytest.approx(5 * free.n_tokens / free.n_params, rel=1e-3)
    assert over.loss > free.loss
    assert allocate(fit, 1e22, limits=Limits(tokens_per_param=100)).n_tokens == pytest.approx(
        100 * np.sqrt(1e22 / 600), rel=1e-3
    )


def test_the_interval_holds_the_truth_and_the_flat_region_is_flat(hoffmann: tuple[FitResult, Runs]) -> None:
    fit, _ = hoffmann
    a = allocate(fit, 1e23)
    n, _, _ = HOFFMANN.allocate(1e23)
    low, high = a.sureness.n_interval
    assert low is not None
    assert high is not None
    assert low * 0.98 < n < high * 1.02
    for end in a.sureness.flat:
        assert float(fit.predict(end, 1e23 / 6 / end)) / a.loss - 1 == pytest.approx(1e-3, rel=0.1)
    assert all(0 <= r < 1e-3 for r in a.sureness.regret)


def test_a_target_under_a_cap_costs_more(hoffmann: tuple[FitResult, Runs]) -> None:
    fit, _ = hoffmann
    free = cheapest_within(fit, 2.2, 1e18)
    capped = cheapest_within(fit, 2.2, 1e18, limits=Limits(max_params=free.n_params / 4))
    assert capped.budget_flops > free.budget_flops
    assert capped.n_params == pytest.approx(free.n_params / 4, rel=1e-3)
    assert float(fit.predict(capped.n_params, capped.n_tokens)) == pytest.approx(2.2, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Limits(overtrain=2, tokens_per_param=20), ("--overtrain", "--tokens-per-param")),
        (lambda: Limits(overtrain=2, served_tokens=1e9), ("--overtrain", "--served-tokens")),
        (lambda: Limits(max_epochs=2), ("--max-epochs", "--unique-tokens")),
        (lambda: Limits(unique_tokens=-1), ("--unique-tokens",)),
        (lambda: options("--usd", "-3"), ("--usd",)),
        (lambda: options("--max-active-params", "0"), ("--max-active-params",)),
        (
            lambda: questions.money(options("--usd", "9", "--device", "mi300x")),
            ("four numbers", "TFLOPS,GB,WATTS,USD"),
        ),
        (lambda: options("--usd", "1e6", "--usd-per-hour", "0"), ("--usd-per-hour",)),
        (lambda: options("--usd", "1e6", "--budget", "1e20"), ("--usd", "--budget")),
        (lambda: options("--mfu", "1.2"), ("--mfu",)),
        (lambda: options("--serve-mfu", ".1"), ("--serve-mfu", "--served-tokens")),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(make: Callable[[], object], names: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as refused:
        make()
    assert all(name in str(refused.value) for name in names)


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        (Limits(tokens_per_param=1, max_params=1e8, max_params_source="--max-params"), ("--tokens", "--max-params")),
        (Limits(overtrain=10, unique_tokens=1e8, max_epochs=2), ("--overtrain", "--max-epochs")),
        (Limits(served_tokens=1e21), ("budget", "--served-tokens")),
    ],
)
def test_limits_that_no_n_keeps_are_named(
    hoffmann: tuple[FitResult, Runs], limits: Limits, names: tuple[str, ...]
) -> None:
    with pytest.raises(InputError, match="conflict") as refused:
        Search(hoffmann[0], limits=limits).best(1e22)
    assert all(name in str(refused.value) for name in names)


def test_a_target_out_of_reach_under_a_cap_names_both(hoffmann: tuple[FitResult, Runs]) -> None:
    with pytest.raises(InputError, match=r"--target-loss 2\.0 and --max-params conflict|--target-loss 2 and --max"):
        cheapest_within(hoffmann[0], 2.0, 1e18, limits=Limits(max_params=1e7, max_params_source="--max-params"))


def test_no_limits_is_the_plain_optimum(hoffmann: tuple[FitResult, Runs]) -> None:
    fit, _ = hoffmann
    assert Search(fit, limits=NONE).best(1e21) == fit.allocate(1e21)
    per_token: Callable[[Floats], Floats] = lambda n: 6.0 * n  # noqa: E731
    assert Search(fit, per_token).best(1e21) == pytest.approx(fit.allocate(1e21), rel=5e-3)


def test_budgets_outside_the_runs_are_said(hoffmann: tuple[FitResult, Runs]) -> None:
    fit, runs = hoffmann
    said = answer(fit, runs, [1e15, 1e21, 1e30]).warnings
    assert any("1e+15 FLOPs is below the smallest run's 1e+18" in w for w in said)
    assert any("1e+30 FLOPs is 1e+08×" in w and "arithmetic" in w for w in said)
    assert not any("1e+21 FLOPs is" in w for w in said)
