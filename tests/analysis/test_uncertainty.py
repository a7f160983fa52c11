"""Bootstrap, seed noise, prediction intervals, the ensemble weighed by backtest."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.inference import FitResult, fit_law
from analysis.inference.backtest import BASELINE, LARGE_SWEEP, MEMBER_DELTA, SMALL_SWEEP, member_loss
from analysis.inference.fitting import LARGE
from analysis.inference.holdout import hold_out
from analysis.inference.points import points, seed_noise
from analysis.inference.solver import ROBUST, Robust, log_predictions
from analysis.inference.uncertainty import bootstrap, influence, resample_weights, robust_scale, t_quantile
from analysis.laws import get_law
from analysis.laws.law import complete
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


def test_seeds_of_one_cell_are_resampled_together(make_sweep: Callable[..., Path]) -> None:
    data = points(load_runs(make_sweep()))
    assert len(data) == 19
    assert data.n_cells == 15
    weights = resample_weights(data, 50, 0)
    for cell in np.unique(data.cell):
        assert np.ptp(weights[:, data.cell == cell], axis=1).max() == 0


def test_seeds_and_branches_that_are_chained_are_resampled_together() -> None:
    """Two trunks with a branch of one cell each make one group; a third trunk is by itself."""
    table = pd.DataFrame(
        {
            "run_id": list("abcde"), "n_params": [1e6, 1e6, 1e6, 1e6, 2e6], "n_tokens": [1e8, 2e8, 1e8, 4e8, 1e8],
            "seed": [0, 0, 1, 1, 0], "trunk": ["t", "t", "u", "u", "v"], "loss": 3.0, "status": "ok",
        }
    )  # fmt: skip
    data = points(Runs(table.assign(flops=6 * table["n_params"] * table["n_tokens"]), "chain", CONVENTION))
    assert data.group is not None
    assert len(set(data.group[:4])) == 1
    assert data.group[4] != data.group[0]


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


def test_the_ensemble_is_weighed_by_what_its_members_foresaw() -> None:
    """Every law of a large sweep is judged, the weights sum to 1, and the whole predicts whether there is a floor or not."""
    fit = fit_law(simulated(0.002, 1), draws=50)
    assert fit.law == "chinchilla"
    assert fit.parameters["E"] > 1
    assert fit.backtest[0]["law"] == "ensemble"
    assert {row["law"] for row in fit.backtest} == {"ensemble", BASELINE, *LARGE_SWEEP}
    assert sum(m.weight for m in fit.ensemble.members) == pytest.approx(1)
    best = min((row for row in fit.backtest if row["law"] in LARGE_SWEEP), key=lambda row: row["rms_error"])
    assert best["law"] in {m.member.law for m in fit.ensemble.members}
    for floor in (1.7, 0.0):
        fit = fit_law(simulated(0.002, 1, floor=floor), draws=50)
        n, d = fit.allocate(1e20)
        true = floor + 400 / n**0.34 + 410 / d**0.28
        assert float(fit.predict(n, d)) == pytest.approx(true, rel=0.02)
        low, high = fit.predict_interval(n, d, 0.9)
        assert low < true < high


def test_the_loss_asked_for_reaches_what_forecasts() -> None:
    """A third of the runs raised by 1 to 4%, as mis-tuned ones are: the asymmetric loss is led astray less."""
    runs = simulated(0.002, 6)
    rng = np.random.default_rng(6)
    rise = np.where(rng.random(len(runs)) < 1 / 3, rng.uniform(0.01, 0.04, len(runs)), 0.0)
    raised = dataclasses.replace(runs, table=runs.table.assign(loss=runs.table["loss"] * np.exp(rise)))
    huber, asymmetric = (fit_law(raised, draws=5, robust=ROBUST[name]) for name in ("huber", "asymmetric"))
    assert {m.member.robust for m in huber.ensemble.members} == {Robust("huber", MEMBER_DELTA)}
    assert {m.member.robust for m in asymmetric.ensemble.members} == {Robust("asymmetric", MEMBER_DELTA, 0.25)}
    true = runs.table["loss"]
    off = [
        np.mean(fit.predict(runs.table["n_params"], runs.table["n_tokens"]) / true) - 1 for fit in (huber, asymmetric)
    ]
    assert off[0] > 2 * abs(off[1])
    assert all(member_loss(ROBUST[name]) == ROBUST[name] for name in ("squared", "absolute"))


def test_a_law_asked_for_predicts_with_the_parameters_shown() -> None:
    """Also where the bootstrap works on a sample of many runs."""
    runs = simulated(0.01, 8, budgets=60, sizes=90)
    assert len(runs) > LARGE
    fit = fit_law(runs, "chinchilla", draws=5)
    assert float(fit.predict(1e9, 2e10)) == pytest.approx(float(fit.surface.predict(fit.parameters, 1e9, 2e10)))


def test_members_of_an_automatic_fit_need_no_more_than_n_and_d() -> None:
    for name in (*LARGE_SWEEP, *SMALL_SWEEP, BASELINE):
        assert set(get_law(name).variables) <= {"n_params", "n_tokens", "flops"}


@settings(max_examples=15)
@given(log_c=st.floats(17, 24), log_ratio=st.floats(-1.5, 1.5))
def test_the_ensemble_lies_between_its_members_and_its_intervals_nest(log_c: float, log_ratio: float) -> None:
    fit = _fit_once()
    n = 10**log_c / 120
    n = float(np.sqrt(n)) * 10**log_ratio
    d = 10**log_c / (6 * n)
    columns = complete({"n_params": [n], "n_tokens": [d]})
    members = [float(log_predictions(m.member.form, m.values[None], columns)[0, 0]) for m in fit.ensemble.members]
    assert len(members) > 1
    centre = float(fit.predict(n, d))
    assert np.exp(min(members)) * (1 - 1e-9) <= centre <= np.exp(max(members)) * (1 + 1e-9)
    ends = [fit.predict_interval(n, d, level) for level in (0.5, 0.8, 0.9, 0.95)]
    lows, highs = [float(e[0]) for e in ends], [float(e[1]) for e in ends]
    assert all(a > b for a, b in itertools.pairwise([centre, *lows]))
    assert all(a < b for a, b in itertools.pairwise([centre, *highs]))


@cache
def _fit_once() -> FitResult:
    return fit_law(simulated(0.005, 11), draws=50)


def test_the_order_of_the_runs_does_not_matter() -> None:
    runs = simulated(0.01, 5)
    mixed = dataclasses.replace(runs, table=runs.table.sample(frac=1, random_state=0).reset_index(drop=True))
    one, two = (fit_law(r, draws=20) for r in (runs, mixed))
    assert two.parameters == pytest.approx(one.parameters, rel=1e-4)
    assert float(two.predict(1e9, 2e10)) == pytest.approx(float(one.predict(1e9, 2e10)), rel=1e-6)


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
    assert set(held.by_law) == {"ensemble", *LARGE_SWEEP, *SMALL_SWEEP}
    with pytest.raises(InputError, match="both sides"):
        hold_out(simulated(0.002, 3), 1e25)


def test_influence_is_what_a_run_moves_the_fit_by() -> None:
    """Against refits with one loss raised by .1%."""
    runs, law, squared = simulated(0.002, 3, sizes=5), get_law("chinchilla"), ROBUST["squared"]
    fit = fit_law(runs, "chinchilla", draws=2, robust=squared)
    values = law.values(fit.parameters)
    a = influence(law, values, points(runs), np.ones(len(runs)))
    for i in (0, 12, 24):
        loss = runs.table["loss"].to_numpy().copy()
        loss[i] *= np.exp(1e-3)
        other = fit_law(
            dataclasses.replace(runs, table=runs.table.assign(loss=loss)), "chinchilla", draws=2, robust=squared
        )
        n, d = 1e9, 2e10
        moved = float(np.log(other.predict(n, d) / fit.predict(n, d))) / 1e-3
        _, gradient = law.value_and_gradient(fit.parameters, n, d)
        assert moved == pytest.approx(float(gradient * values / fit.predict(n, d) @ a[:, i]), rel=0.05)


def test_residuals_keep_n_minus_p_of_the_noise_and_it_is_estimated_without_bias() -> None:
    estimates = []
    for seed in range(20):
        runs = simulated(0.01, seed, sizes=5)
        fit = fit_law(runs, "chinchilla", draws=2, robust=ROBUST["squared"])
        left = fit.ensemble.residual_scale(points(runs))
        assert (left**2).sum() == pytest.approx(25 - 5, rel=0.01)
        estimates.append(fit.run_noise)
    assert np.mean(estimates) == pytest.approx(0.01, abs=3 * np.std(estimates) / 20**0.5)
    assert np.std(estimates) < 0.004


def test_where_few_runs_decide_the_interval_knows_what_a_bootstrap_does_not() -> None:
    """Two seeds of one cell 300 times above the other runs: the law passes through their mean."""
    small, rng = simulated(0.01, 1, budgets=3), np.random.default_rng(2)
    n = np.sqrt(3e21 / 120)
    loss = 1.7 + 400 / n**0.34 + 410 / (3e21 / 6 / n) ** 0.28
    far = pd.DataFrame(
        {
            "run_id": ["far", "far too"], "seed": [0, 1], "n_params": n, "n_tokens": 3e21 / 6 / n, "flops": 3e21,
            "loss": loss * np.exp(0.01 * rng.standard_normal(2)), "status": "ok",
        }
    )  # fmt: skip
    both = pd.concat([small.table.assign(seed=0), far], ignore_index=True)
    fit = fit_law(dataclasses.replace(small, table=both), "chinchilla", draws=300, robust=ROBUST["squared"])
    columns = fit.columns(n, 3e21 / 6 / n)
    resampled = float(((fit.ensemble.draws(columns) - fit.ensemble.log_loss(columns)) ** 2).mean())
    found = float(fit.ensemble.parameter_variance(columns, fit.run_noise)[0])
    assert found == pytest.approx(fit.run_noise**2 / 2, rel=0.1)
    assert resampled < found / 2


def test_robust_scale_of_normal_values_and_beside_outliers() -> None:
    x = np.random.default_rng(0).standard_normal(20_000)
    assert robust_scale(x, np.ones(len(x))) == pytest.approx(1, abs=0.02)
    x[:1000] = 50
    assert 1 < robust_scale(x, np.ones(len(x))) < 1.1
    assert robust_scale(np.zeros(5), np.ones(5)) == 0


def test_bootstrap_of_noise_free_runs_does_not_move() -> None:
    data = points(simulated(0.0, 0))
    law = get_law("chinchilla")
    best = np.array([1.7, 400, 410, 0.34, 0.28])
    draws = bootstrap(law, data, best, 20, 0).values
    assert np.ptp(draws / best, axis=0).max() < 1e-5


def test_t_quantile() -> None:
    assert t_quantile(0.9, 4) == pytest.approx(2.132, abs=1e-3)
    assert t_quantile(0.5, 10**6) == pytest.approx(0.6745, abs=1e-3)
