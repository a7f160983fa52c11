"""Profile intervals: they agree with the bootstrap, cover, and say where a parameter is not identified."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.inference.points import Points
from analysis.inference.profile import profile_intervals
from analysis.inference.solver import ROBUST, solve
from analysis.inference.uncertainty import bootstrap
from analysis.laws import Floats, get_law
from analysis.laws.law import complete
from scaling.errors import InputError

LAW = get_law("chinchilla")


def as_points(n: Floats, d: Floats, loss: Floats) -> Points:
    columns = complete({"n_params": n, "n_tokens": d})
    return Points(columns, loss, np.arange(len(n)), tuple(f"r{i}" for i in range(len(n))))


def simulated(floor: float, noise: float, seed: int, a: float = 60.0, alpha: float = 0.17) -> Points:
    budgets, ratios = (v.ravel() for v in np.meshgrid(np.geomspace(1e17, 1e19, 5), np.geomspace(0.25, 4, 7)))
    n = np.sqrt(budgets / 120) * ratios
    d = budgets / (6 * n)
    spread = np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return as_points(n, d, (floor + a / n**alpha + a / d**alpha) * spread)


def fitted(data: Points, loss: str = "huber") -> Floats:
    return solve(LAW, data.columns, data.loss, ROBUST[loss]).values[0]


@pytest.fixture
def epoch(golden: Path) -> Points:
    frame = pd.read_csv(golden / "epoch_svg" / "points.csv")
    frame = frame.drop(frame["loss"].nlargest(5).index)
    n, c = frame["Model Size"].to_numpy(float), frame["Training FLOP"].to_numpy(float)
    return as_points(n, c / (6 * n), frame["loss"].to_numpy(float))


@pytest.mark.parametrize(("loss", "within"), [("huber", 0.32), ("squared", 0.15)])
def test_widths_on_the_epoch_points_agree_with_the_bootstraps(epoch: Points, loss: str, within: float) -> None:
    """In ln of the parameter, which is what A and B are known by. β with Huber's loss is the widest apart."""
    values = fitted(epoch, loss)
    started = time.process_time()
    found = profile_intervals(LAW, epoch, values, ROBUST[loss])
    assert time.process_time() - started < 1.0  # .2 s here; slack for a busy machine
    draws = bootstrap(LAW, epoch, values, 1000, 0, ROBUST[loss]).values
    for i, name in enumerate(LAW.free):
        low, high = found[name]
        assert low is not None
        assert high is not None
        assert low < values[i] < high
        resampled = np.diff(np.log(np.quantile(draws[:, i], (0.025, 0.975))))[0]
        assert np.log(high / low) == pytest.approx(resampled, rel=within)


def test_a_floor_far_below_the_losses_is_open_at_zero() -> None:
    for seed in range(3):
        data = simulated(0.05, 0.005, seed)
        values = fitted(data)
        low, high = profile_intervals(LAW, data, values, names=["E"])["E"]
        assert low is None
        assert high is not None
        assert max(values[0], 0.05) < high < 0.5 * data.loss.min()


def test_an_exponent_of_a_term_that_is_not_there_is_open() -> None:
    data = simulated(1.7, 0.01, 0, a=0.0)
    found = profile_intervals(LAW, data, fitted(data), names=["alpha", "beta"])
    assert all(None in ends for ends in found.values())


def test_an_interval_holds_the_fit_and_narrows_with_noise_and_level() -> None:
    wide, narrow = simulated(1.7, 0.01, 1), simulated(1.7, 0.001, 1)
    found = [
        profile_intervals(LAW, data, fitted(data), names=["alpha"], level=level)["alpha"]
        for data, level in ((wide, 0.95), (wide, 0.5), (narrow, 0.95))
    ]
    widths = []
    for low, high in found:
        assert low is not None
        assert high is not None
        widths.append(high - low)
    assert widths[0] > widths[1]
    assert widths[0] > 4 * widths[2]


def test_the_ends_are_where_the_objective_says() -> None:
    """Refits with α held there are equally worse, and by about t² = 4.2 variances, as noise is alike everywhere."""
    data = simulated(1.7, 0.005, 2)
    values = fitted(data, "squared")
    least = solve(LAW, data.columns, data.loss, ROBUST["squared"]).objective[0]
    ends = profile_intervals(LAW, data, values, ROBUST["squared"], ["alpha"])["alpha"]
    rises = []
    for end in ends:
        assert end is not None
        held = LAW.restrict(alpha=end)
        rises.append(solve(held, data.columns, data.loss, ROBUST["squared"]).objective[0] - least)
    assert rises[0] == pytest.approx(rises[1], rel=0.05)
    variance = 2 * least / (len(data) - 5)
    assert 2.1 < 2 * rises[0] / variance < 8.4


def test_true_values_are_covered() -> None:
    truth = {"E": 1.7, "alpha": 0.17, "beta": 0.17}
    inside = dict.fromkeys(truth, 0)
    trials = 40
    for seed in range(trials):
        data = simulated(1.7, 0.005, 100 + seed)
        found = profile_intervals(LAW, data, fitted(data, "squared"), ROBUST["squared"], list(truth))
        for name, (low, high) in found.items():
            inside[name] += (low is None or low <= truth[name]) and (high is None or truth[name] <= high)
    assert min(inside.values()) >= 0.88 * trials


def test_bad_input_is_said() -> None:
    data = simulated(1.7, 0.005, 0)
    values = fitted(data)
    with pytest.raises(InputError, match="alhpa"):
        profile_intervals(LAW, data, values, names=["alhpa"])
    with pytest.raises(InputError, match="need more runs than parameters"):
        profile_intervals(LAW, data.take(np.arange(5)), values)
