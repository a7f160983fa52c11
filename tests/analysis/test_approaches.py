"""Chinchilla's approaches 1, 2 and 3, and approach 2's published bias."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.inference.isoflop import approach_2, approaches, isoflop_minima, power_law
from analysis.inference.points import Points, compute_levels, frontier_rows
from analysis.laws.surface import Floats, compute_optimal, log_variables

SURFACE = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def isoflop(parameters: dict[str, float], reach: float, sizes: int = 15, budgets: int = 5) -> Points:
    """Noise-free IsoFLOP runs, sizes centred on the optimum of each budget from 1e17 to 1e21."""
    n, d = [], []
    for c in np.geomspace(1e17, 1e21, budgets):
        best, _ = compute_optimal(parameters, c)
        n.append(best * np.geomspace(1 / reach, reach, sizes))
        d.append(c / 6 / n[-1])
    return _points(parameters, np.concatenate(n), np.concatenate(d))


def _points(p: dict[str, float], n: Floats, d: Floats) -> Points:
    loss = p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]
    return Points(log_variables(n, d), loss, np.arange(len(n)), tuple(f"r{i}" for i in range(len(n))))


@pytest.mark.parametrize(("reach", "bias"), [(2, -0.0033), (4, -0.0130), (8, -0.0290), (16, -0.0510)])
def test_approach_2_has_its_published_bias_without_noise(reach: float, bias: float) -> None:
    found = approach_2(isoflop(SURFACE, reach))
    d_true = compute_optimal(SURFACE, 1e24)[1]
    assert found["d_coefficient"] * 1e24 ** found["d_exponent"] / d_true - 1 == pytest.approx(bias, abs=5e-5)


def test_approach_2_is_unbiased_on_a_symmetric_surface() -> None:
    surface = {**SURFACE, "alpha": 0.31, "beta": 0.31}
    found = approach_2(isoflop(surface, 8))
    assert found["d_coefficient"] * 1e24 ** found["d_exponent"] == pytest.approx(
        compute_optimal(surface, 1e24)[1], rel=1e-6
    )


def test_all_three_agree_on_a_dense_grid() -> None:
    found = approaches(isoflop(SURFACE, 4), SURFACE)
    exponent = SURFACE["beta"] / (SURFACE["alpha"] + SURFACE["beta"])
    assert found["3"]["n_exponent"] == pytest.approx(exponent)
    assert found["2"]["n_exponent"] == pytest.approx(exponent, abs=0.01)
    assert found["1"]["n_exponent"] == pytest.approx(exponent, abs=0.05)
    n, d = compute_optimal(SURFACE, 1e24)
    assert found["3"]["n_coefficient"] * 1e24 ** found["3"]["n_exponent"] == pytest.approx(n)
    assert found["3"]["d_coefficient"] * 1e24 ** found["3"]["d_exponent"] == pytest.approx(d)


def test_runs_that_do_not_permit_an_approach_are_told_why() -> None:
    rng = np.random.default_rng(0)
    scattered = _points(SURFACE, 10 ** rng.uniform(7, 9, 8), 10 ** rng.uniform(9, 10, 8))
    assert "at least 3 sizes" in approaches(scattered, None)["2"]["reason"]
    assert "no surface" in approaches(scattered, None)["3"]["reason"]
    one = isoflop(SURFACE, 4, budgets=1)
    assert "lower envelope" in approaches(one, SURFACE)["1"]["reason"]


def test_a_minimum_at_the_edge_of_the_sizes_is_none() -> None:
    data = isoflop(SURFACE, 4)
    below = data.take(np.concatenate([np.arange(15 * k, 15 * k + 6) for k in range(5)]))  # sizes under the optimum
    assert isoflop_minima(below) == []


def test_llama_3_both_ways(golden) -> None:  # type: ignore[no-untyped-def]
    import dataclasses

    from analysis.inference.points import points
    from analysis.runs import load_runs

    runs = load_runs(golden / "llama_3" / "points.csv")
    runs = dataclasses.replace(runs, table=runs.table.iloc[:133])
    found = approach_2(points(runs))
    assert found["points"] == 10
    assert found["n_coefficient"] * 3.8e25 ** found["n_exponent"] == pytest.approx(393e9, rel=0.01)
    assert found["d_coefficient"] * 3.8e25 ** found["d_exponent"] == pytest.approx(16.1e12, rel=0.01)


def test_frontier_and_levels() -> None:
    data = isoflop(SURFACE, 4)
    assert len(np.unique(compute_levels(data))) == 5
    mask = frontier_rows(data)
    assert mask.sum() == 5  # the optimum of each budget
    assert mask[7::15].all()


def test_power_law() -> None:
    x = np.geomspace(1, 1e6, 9)
    assert power_law(x, 3 * x**0.7) == pytest.approx((3, 0.7))
