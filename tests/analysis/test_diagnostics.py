"""Outliers by name, the effect of leaving a run out, what is identified, conventions; all on surfaces that are known."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pandas as pd
import pytest

from analysis.inference import FitResult, fit_law
from analysis.inference.conventions import compare_conventions
from analysis.inference.diagnostics import OUTLIER, Diagnostics, diagnose
from analysis.inference.points import points
from analysis.inference.solver import ROBUST, solve
from analysis.laws.surface import get_law
from analysis.runs import Runs

TRUTH = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}
TARGET = (1e9, 2e10)


def simulated(noise: float = 0.003, seed: int = 0, lift: dict[int, float] | None = None) -> Runs:
    """Five budgets of seven sizes; `lift`: run → factor on its loss."""
    rng = np.random.default_rng(seed)
    c = np.repeat([1e17, 3e17, 1e18, 3e18, 1e19], 7)
    n = np.tile(np.geomspace(0.25, 4, 7), 5) * (c / 120) ** 0.5
    d = c / 6 / n
    loss = TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]
    loss *= np.exp(noise * rng.standard_normal(len(n)))
    for row, factor in (lift or {}).items():
        loss[row] *= factor
    ids = [f"run{i}" for i in range(len(n))]
    table = pd.DataFrame({"run_id": ids, "n_params": n, "n_tokens": d, "flops": c, "loss": loss, "status": "ok"})
    return Runs(table, "simulated", {"params": "as_given", "flops": "6nd", "loss": "nats_per_token"})


def both(runs: Runs, law: str = "chinchilla") -> tuple[FitResult, Diagnostics]:
    fit = fit_law(runs, law, draws=100)
    return fit, diagnose(fit, runs, TARGET)


def test_every_run_has_its_residual_in_the_fits_order() -> None:
    runs = simulated()
    fit, found = both(runs)
    assert tuple(r.run_id for r in found.residuals) == fit.run_ids
    predicted = fit.predict(runs.table["n_params"], runs.table["n_tokens"])
    assert [r.residual for r in found.residuals] == pytest.approx(np.log(runs.table["loss"] / predicted))
    assert found.scale == pytest.approx(0.003, rel=0.5)


def test_clean_runs_hardly_ever_have_outliers() -> None:
    assert sum(both(simulated(seed=seed))[1].n_outliers for seed in range(10)) <= 1


@pytest.mark.parametrize("law", ["chinchilla", "auto"])
def test_a_mistuned_run_is_named_and_lies_above(law: str) -> None:
    _, found = both(simulated(lift={10: 1.05, 31: 1.08}), law)
    assert [e.run_id for e in found.outliers] == ["run31", "run10"]
    assert all(e.z > OUTLIER for e in found.outliers)
    assert found.n_outliers == 2


def test_the_effect_is_that_of_the_fit_without_the_run() -> None:
    runs = simulated(lift={31: 1.08})
    fit, found = both(runs)
    without = fit_law(
        dataclasses.replace(runs, table=runs.table.drop(31).reset_index(drop=True)), "chinchilla", draws=2
    )
    effect = found.outliers[0]
    for name, change in effect.parameters.items():
        actual = without.parameters[name] - fit.parameters[name]
        assert change == pytest.approx(actual, rel=0.02, abs=2e-4 * fit.parameters[name])
    actual = float(without.predict(*TARGET) / fit.predict(*TARGET)) - 1
    assert effect.law_loss_at_target == pytest.approx(actual, abs=2e-5)
    assert effect.loss_at_target == pytest.approx(actual, abs=2e-5)


def test_the_influential_run_is_the_one_whose_absence_moves_the_forecast_most() -> None:
    runs = simulated()
    fit, found = both(runs)
    moved, data, law = [], points(runs), get_law("chinchilla")
    for i in range(len(runs)):
        less = data.take(np.arange(len(runs)) != i)
        without = law.parameters(solve(law, less.columns, less.loss).values[0])
        moved.append(abs(float(law.predict(without, *TARGET)) / float(fit.predict(*TARGET)) - 1))
    assert found.influential[0].run_id == f"run{int(np.argmax(moved))}"
    assert abs(found.influential[0].law_loss_at_target or 0) == pytest.approx(max(moved), rel=0.05)


def test_seed_noise_is_no_outlier() -> None:
    runs = simulated(noise=0.0)
    table = pd.concat([runs.table.assign(seed=0), runs.table.assign(seed=1, run_id=runs.table["run_id"] + "b")])
    table["loss"] *= np.where(np.arange(len(table)) % 35 == 3, 1 + 0.02 * (table["seed"] - 0.5), 1.0)
    fit = fit_law(dataclasses.replace(runs, table=table.reset_index(drop=True)), "chinchilla", draws=20)
    assert fit.seed_noise is not None
    found = diagnose(fit, dataclasses.replace(runs, table=table.reset_index(drop=True)), TARGET)
    assert found.scale >= fit.seed_noise
    assert found.n_outliers <= 2


def test_noise_free_runs_have_no_outliers() -> None:
    _, found = both(simulated(noise=0.0))
    assert found.n_outliers == 0


def test_what_is_identified() -> None:
    _, found = both(simulated(noise=0.001))
    assert all(found.identified.values())
    assert found.identification == ()
    one = simulated(noise=0.01)
    _, weak = both(dataclasses.replace(one, table=one.table.iloc[:7].reset_index(drop=True)))
    assert not weak.identified["E"]
    ray = simulated().table.assign(n_tokens=lambda t: 20 * t["n_params"], flops=lambda t: 120 * t["n_params"] ** 2)
    _, split = both(dataclasses.replace(simulated(), table=ray))
    assert not any(split.identified[name] for name in ("A", "B", "alpha", "beta"))


def test_a_tied_parameter_counts_as_identified_and_a_law_of_compute_works() -> None:
    _, tied = both(simulated(), "tied")
    assert tied.identified["beta"]
    fit, found = both(simulated(), "frontier")
    assert len(found.residuals) == fit.n_runs < 35


def test_losses_that_rise_with_compute_are_said() -> None:
    runs = simulated()
    _, found = both(dataclasses.replace(runs, table=runs.table.assign(loss=10 / runs.table["loss"])))
    assert any("hardly falls" in line for line in found.identification)


def test_diagnostics_of_240_runs_take_less_than_a_second_of_cpu() -> None:
    tables = [simulated(seed=s).table.assign(run_id=lambda t, s=s: f"{s}-" + t["run_id"]) for s in range(7)]
    shift = [t.assign(n_params=t["n_params"] * (1 + 0.01 * i)) for i, t in enumerate(tables)]
    runs = dataclasses.replace(simulated(), table=pd.concat(shift, ignore_index=True))
    fit = fit_law(runs, "chinchilla", draws=20)
    started = time.process_time()
    found = diagnose(fit, runs, TARGET, ROBUST["huber"])
    assert time.process_time() - started < 1
    assert len(found.residuals) == 245


def test_conventions_move_the_exponents_as_the_counting_says() -> None:
    runs = simulated(noise=0.0)
    squared = dataclasses.replace(
        runs,
        table=runs.table.assign(n_params=runs.table["n_params"] ** 1.25),
        convention={**runs.convention, "params": "total"},
    )
    given, other = compare_conventions([runs, squared], 1e20)
    assert given.alpha == pytest.approx(TRUTH["alpha"], abs=1e-4)
    assert other.alpha == pytest.approx(TRUTH["alpha"] / 1.25, abs=1e-4)
    assert given.n_exponent == pytest.approx(TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]), abs=1e-4)
    assert given.n_exponent_isoflop == pytest.approx(given.n_exponent, abs=0.02)
    assert compare_conventions([runs], 1e20) == ()
