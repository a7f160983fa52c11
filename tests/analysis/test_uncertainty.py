"""Bootstrap, seed noise, prediction intervals, the choice of law by backtest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.inference import FitResult, fit_law
from analysis.inference.backtest import CANDIDATES
from analysis.inference.holdout import hold_out
from analysis.inference.points import points, seed_noise
from analysis.inference.uncertainty import bootstrap, resample_weights, t_quantile
from analysis.laws import get_law
from analysis.runs import Runs, load_runs
from scaling.errors import InputError

CONVENTION = {"params": "as_given", "flops": "6nd", "loss": "as_given"}


def simulated(noise: float, seed: int, budgets: int = 5, sizes: int = 7, floor: float = 1.7) -> Runs:
    """A Chinchilla-like IsoFLOP sweep of 1e17–1e19 FLOPs."""
    rng = np.random.default_rng(seed)
    c, ratio = (a.ravel() for a in np.meshgrid(np.geomspace(1e17, 1e19, budgets), np.geomspace(0.25, 4, sizes)))
    n = np.sqrt(c / 120) * ratio
    d = c / (6 * n)
    loss = (floor + 400 / n**0.34 + 410 / d**0.28) * np.exp(noise * rng.standard_normal(len(n)))
    table = pd.DataFrame(
        {"run_id": [f"r{i}" for i in range(len(n))], "n_params": n, "n_tokens": d, "flops": c, "loss": loss}
    )
    return Runs(table.assign(status="ok"), "simulated", CONVENTION)


def test_bootstrap_of_the_epoch_points_agrees_with_the_published_one(golden: Path) -> None:
    runs = load_runs(golden / "epoch_svg" / "points.csv")
    runs = dataclasses.replace(runs, table=runs.table.sort_values("loss").iloc[:-5].reset_index(drop=True))
    fit = fit_law(runs, "chinchilla", draws=1000)
    sd = {name: float(np.std(draws)) for name, draws in fit.samples.items()}
    assert sd["E"] == pytest.approx(0.0257, rel=0.1)
    assert sd["A"] == pytest.approx(124.5, rel=0.1)
    assert sd["alpha"] == pytest.approx(0.0154, abs=1e-3)
    assert sd["beta"] == pytest.approx(0.0206, abs=1.5e-3)
    for name, published in {"E": (1.769, 1.871), "alpha": (0.317, 0.373), "beta": (0.331, 0.415)}.items():
        assert fit.intervals[name] == pytest.approx(published, abs=0.006)


def test_chinchillas_own_law_stands_on_published_runs(golden: Path) -> None:
    epoch = load_runs(golden / "epoch_svg" / "points.csv")
    llama = load_runs(golden / "llama_3" / "points.csv")
    for runs, rows in ((epoch, slice(None)), (llama, slice(0, 133))):
        assert fit_law(dataclasses.replace(runs, table=runs.table.iloc[rows]), draws=20).law == "chinchilla"


def test_seeds_of_one_cell_are_resampled_together(make_sweep: Callable[..., Path]) -> None:
    data = points(load_runs(make_sweep()))
    assert len(data) == 19
    assert data.n_cells == 15
    weights = resample_weights(data, 50, 0)
    for cell in np.unique(data.cell):
        assert np.ptp(weights[:, data.cell == cell], axis=1).max() == 0


def test_seed_noise_is_the_pooled_spread_between_replicates() -> None:
    runs = simulated(0.0, 0)
    assert seed_noise(points(runs)) is None
    rng = np.random.default_rng(1)
    copies = [runs.table.assign(loss=runs.table["loss"] * np.exp(0.01 * rng.standard_normal(35))) for _ in range(4)]
    replicated = dataclasses.replace(runs, table=pd.concat(copies, ignore_index=True))
    assert seed_noise(points(replicated)) == pytest.approx(0.01, rel=0.2)


def test_runs_at_other_learning_rates_are_no_replicates() -> None:
    runs = simulated(0.0, 0)
    both = pd.concat(
        [runs.table.assign(peak_lr=1e-3), runs.table.assign(peak_lr=2e-3, loss=runs.table["loss"] * 1.1)]
    )
    assert seed_noise(points(dataclasses.replace(runs, table=both.reset_index(drop=True)))) is None


def test_intervals_widen_with_level_noise_and_extrapolation() -> None:
    quiet, noisy = (fit_law(simulated(noise, 2), "chinchilla", draws=200) for noise in (0.001, 0.01))

    def width(fit: FitResult, budget: float, level: float) -> float:
        n, d = fit.allocate(budget)
        low, high = fit.predict_interval(n, d, level)
        assert low < fit.predict(n, d) < high
        return float(high - low)

    assert width(quiet, 1e20, 0.5) < width(quiet, 1e20, 0.9)
    assert width(quiet, 1e20, 0.9) < width(noisy, 1e20, 0.9)
    assert width(quiet, 1e19, 0.9) < width(quiet, 1e20, 0.9) < width(quiet, 1e22, 0.9)


@pytest.mark.slow
def test_prediction_intervals_cover() -> None:
    inside = {0.5: 0, 0.9: 0}
    trials = 40
    for seed in range(trials):
        runs = simulated(0.005, seed)
        fit = fit_law(runs, "chinchilla", draws=200)
        n, d = fit.allocate(1e20)
        actual = (1.7 + 400 / n**0.34 + 410 / d**0.28) * np.exp(
            0.005 * np.random.default_rng(900 + seed).standard_normal()
        )
        for level in inside:
            low, high = fit.predict_interval(n, d, level)
            inside[level] += bool(low <= actual <= high)
    assert 0.4 <= inside[0.5] / trials <= 0.9  # the form term makes a correct law's interval wide, never narrow
    assert inside[0.9] / trials >= 0.85


def test_equal_seeds_give_equal_results() -> None:
    one, two = (fit_law(simulated(0.01, 4), draws=50, seed=7) for _ in range(2))
    assert one.parameters == two.parameters
    assert one.intervals == two.intervals
    assert one.backtest == two.backtest


def test_backtest_chooses_the_law_that_predicts_held_out_compute() -> None:
    """Chinchilla's law stands when true; a surface without floor is given to the law without one when it wins clearly."""
    fit = fit_law(simulated(0.002, 1), draws=20)
    assert fit.parameters["E"] > 1
    assert {row["law"] for row in fit.backtest} == set(CANDIDATES)
    assert fit.backtest[0]["law"] == fit.law
    assert sum(r.weight for r in fit.rivals) < 1
    none = fit_law(simulated(0.002, 1, floor=0.0), draws=20)
    n, d = none.allocate(1e20)
    assert float(none.predict(n, d)) == pytest.approx(400 / n**0.34 + 410 / d**0.28, rel=0.02)


def test_small_sweeps_get_a_smaller_law_or_are_refused() -> None:
    runs = simulated(0.0, 0, budgets=2, sizes=2)
    few = dataclasses.replace(runs, table=runs.table.iloc[:3])
    with pytest.raises(InputError, match=r"3 different \(N, D\) are too few for the law 'chinchilla', which has 5"):
        fit_law(few, "chinchilla")
    assert fit_law(few, draws=10).law == "tied_no_floor"
    with pytest.raises(InputError, match="too few"):
        fit_law(dataclasses.replace(runs, table=runs.table.iloc[:2]))
    repeated = dataclasses.replace(runs, table=pd.concat([few.table] * 3, ignore_index=True))
    with pytest.raises(InputError, match="3 different"):
        fit_law(repeated, "chinchilla")


def test_what_cannot_be_identified_is_said() -> None:
    runs = simulated(0.002, 0)
    ray = runs.table.assign(n_tokens=20 * runs.table["n_params"])
    ray["flops"] = 6 * ray["n_params"] * ray["n_tokens"]
    fit = fit_law(dataclasses.replace(runs, table=ray), "chinchilla", draws=20)
    assert any("one tokens-per-parameter ray" in w for w in fit.warnings)
    one = simulated(0.002, 0, budgets=1, sizes=9)
    assert any("one compute budget" in w for w in fit_law(one, "chinchilla", draws=20).warnings)


def test_hold_out_predicts_the_top_level() -> None:
    held = hold_out(simulated(0.002, 3), draws=50)
    assert len(held.rows) == 7
    assert held.fit.n_runs == 28
    assert max(abs(r["relative_error"]) for r in held.rows) < 0.03
    assert set(CANDIDATES) <= set(held.by_law)
    with pytest.raises(InputError, match="both sides"):
        hold_out(simulated(0.002, 3), 1e25)


def test_bootstrap_of_noise_free_runs_does_not_move() -> None:
    data = points(simulated(0.0, 0))
    law = get_law("chinchilla")
    best = np.array([1.7, 400, 410, 0.34, 0.28])
    draws = bootstrap(law, data, best, 20, 0).values
    assert np.ptp(draws / best, axis=0).max() < 1e-5


def test_t_quantile() -> None:
    assert t_quantile(0.9, 4) == pytest.approx(2.132, abs=1e-3)
    assert t_quantile(0.5, 10**6) == pytest.approx(0.6745, abs=1e-3)
