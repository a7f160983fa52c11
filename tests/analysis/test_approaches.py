"""Chinchilla's approaches 1, 2 and 3, and approach 2's published bias."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.inference.isoflop import (
    LossSurface,
    approach_1,
    approach_2,
    approach_2_bias,
    approaches,
    at_budget,
    disagreement,
    hull_rows,
    isoflop_minima,
    power_law,
    wasted_compute,
)
from analysis.inference.points import Points, compute_levels, frontier_rows
from analysis.laws.law import Floats
from analysis.laws.power import compute_optimal
from scaling.errors import InputError

SURFACE = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
SYMMETRIC = {**SURFACE, "alpha": 0.31, "beta": 0.31}
TARGET = 1e24


def isoflop(
    parameters: dict[str, float], reach: float, sizes: int = 15, budgets: int = 5, drift: float = 1.0
) -> Points:
    """Noise-free IsoFLOP runs, sizes around the optimum N* of each budget from 1e17 to 1e21.

    Args:
        drift: how far the centre ends below N*: N* at the lowest budget, N*/drift at the highest, linear in ln C.
    """
    n, d = [], []
    for c, t in zip(np.geomspace(1e17, 1e21, budgets), np.linspace(0, 1, budgets), strict=True):
        centre = compute_optimal(parameters, c)[0] / drift**t
        n.append(centre * np.geomspace(1 / reach, reach, sizes))
        d.append(c / 6 / n[-1])
    return _points(parameters, np.concatenate(n), np.concatenate(d))


def surface(p: dict[str, float]) -> LossSurface:
    return LossSurface(lambda n, d: _loss(p, n, d), lambda c: compute_optimal(p, c))


def _loss(p: dict[str, float], n: Floats, d: Floats) -> Floats:
    return p["E"] + p["A"] * n ** -p["alpha"] + p["B"] * d ** -p["beta"]


def _points(p: dict[str, float], n: Floats, d: Floats) -> Points:
    columns = {"n_params": n, "n_tokens": d, "flops": 6 * n * d}
    return Points(columns, _loss(p, n, d), np.arange(len(n)), tuple(f"r{i}" for i in range(len(n))))


def d_bias(parameters: dict[str, float], data: Points, outside: bool = False) -> float:
    (row,) = approach_2_bias(data, surface(parameters), [TARGET], outside=outside)["budgets"]
    assert row["budget_flops"] == TARGET
    return float(row["n_tokens"])


@pytest.mark.parametrize(("reach", "percent"), [(2, -0.33), (4, -1.30), (8, -2.90), (16, -5.10)])
def test_approach_2_has_its_published_bias_without_noise(reach: float, percent: float) -> None:
    assert round(100 * d_bias(SURFACE, isoflop(SURFACE, reach)), 2) == percent


@pytest.mark.parametrize(("reach", "percent"), [(2, 11.61), (4, 9.83), (8, 6.94), (16, 3.05)])
def test_approach_2_has_its_published_bias_on_a_drifting_grid(reach: float, percent: float) -> None:
    """The centre is N* at 1e17 and N*/3 at 1e21, ln(centre/N*) linear in ln C between.

    Published (Czech et al. 2026) with minima outside the sizes included: at ±2× the two largest budgets' are.
    """
    assert round(100 * d_bias(SURFACE, isoflop(SURFACE, reach, drift=3), outside=True), 2) == percent


@pytest.mark.parametrize(("reach", "percent"), [(2, -1.67), (4, -6.50), (8, -13.91), (16, -23.12)])
def test_approach_2_has_its_published_bias_on_an_asymmetric_surface(reach: float, percent: float) -> None:
    asymmetric = {**SURFACE, "alpha": 0.465, "beta": 0.155}
    assert round(100 * d_bias(asymmetric, isoflop(asymmetric, reach), outside=True), 2) == percent


def test_minima_outside_the_sizes_are_left_out_unless_asked_for() -> None:
    data = isoflop(SURFACE, 2, drift=3)
    assert [len(isoflop_minima(data)), len(isoflop_minima(data, outside=True))] == [3, 5]
    assert d_bias(SURFACE, data) == pytest.approx(0.043, abs=0.001)


@pytest.mark.parametrize("reach", [2, 4, 8, 16])
def test_approach_2_is_unbiased_on_a_symmetric_centred_grid(reach: float) -> None:
    assert abs(d_bias(SYMMETRIC, isoflop(SYMMETRIC, reach))) < 1e-6


def test_the_bias_is_of_the_grid_and_not_of_its_losses() -> None:
    """The runs' own losses do not enter; N* and D* err in opposite directions, since N·D = C/6."""
    data = isoflop(SURFACE, 8)
    shifted = Points(data.columns, data.loss[::-1].copy(), data.cell, data.run_ids)
    found = approach_2_bias(shifted, surface(SURFACE), [1e21, TARGET])["budgets"]
    assert found == approach_2_bias(data, surface(SURFACE), [1e21, TARGET])["budgets"]
    for row in found:
        assert (1 + row["n_params"]) * (1 + row["n_tokens"]) == pytest.approx(1)
    scattered = data.take(np.arange(0, 75, 15))
    assert "at least 3 sizes" in approach_2_bias(scattered, surface(SURFACE), [TARGET])["reason"]


def test_akima_is_less_biased_than_the_parabola_on_a_wide_grid() -> None:
    for reach in (8, 16):
        data = isoflop(SURFACE, reach)
        akima = approach_2_bias(data, surface(SURFACE), [TARGET], curve="akima")["budgets"][0]["n_tokens"]
        assert abs(akima) < abs(d_bias(SURFACE, data)) / 4
    minima = isoflop_minima(isoflop(SURFACE, 4), curve="akima")
    assert [m.flops for m in minima] == pytest.approx(np.geomspace(1e17, 1e21, 5).tolist())
    for m in minima:
        assert m.n_params == pytest.approx(compute_optimal(SURFACE, m.flops)[0], rel=0.02)
        assert m.loss == pytest.approx(_loss(SURFACE, *map(np.array, compute_optimal(SURFACE, m.flops))), rel=1e-4)


def test_akima_takes_the_mean_of_seeds_and_no_minimum_at_the_edge() -> None:
    data = isoflop(SURFACE, 4)
    noise = np.where(np.arange(75) % 2, 0.01, -0.01)
    seeds = Points(
        {name: np.tile(values, 2) for name, values in data.columns.items()},
        np.concatenate([data.loss + noise, data.loss - noise]),
        np.tile(data.cell, 2),
        tuple(f"s{i}" for i in range(150)),
    )
    both = approach_2(seeds, "akima"), approach_2(data, "akima")
    assert both[0]["n_exponent"] == pytest.approx(both[1]["n_exponent"], rel=1e-9)
    below = data.take(np.concatenate([np.arange(15 * k, 15 * k + 6) for k in range(5)]))
    assert isoflop_minima(below, curve="akima") == []


def test_unknown_curve_and_frontier_list_the_valid_ones() -> None:
    data = isoflop(SURFACE, 4)
    with pytest.raises(InputError, match="akima, parabola"):
        approach_2(data, "cubic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="envelope, hull"):
        approach_1(data, "pareto")  # type: ignore[arg-type]


def test_disagreement_in_allocation_and_wasted_compute() -> None:
    data = isoflop(SURFACE, 16)
    found = approaches(data, SURFACE)
    rows = disagreement(found, surface(SURFACE), TARGET)
    assert rows["3"]["n_vs_surface"] == pytest.approx(0, abs=1e-9)
    assert rows["3"]["wasted_compute"] == pytest.approx(0, abs=1e-9)
    assert rows["2"]["d_vs_surface"] == pytest.approx(-0.0510, abs=5e-5)
    assert rows["2"]["n_params"] == pytest.approx(at_budget(found["2"], TARGET)[0])
    assert 0 < rows["2"]["wasted_compute"] < 0.01
    assert set(disagreement({"1": {"reason": "none"}, "3": found["3"]}, surface(SURFACE), TARGET)) == {"3"}


@pytest.mark.parametrize("factor", [0.1, 0.5, 2, 1000])
def test_wasted_compute_is_what_the_optimum_would_have_saved(factor: float) -> None:
    n_best, _ = compute_optimal(SURFACE, TARGET)
    wasted = wasted_compute(surface(SURFACE), factor * n_best, TARGET)
    n, d = compute_optimal(SURFACE, TARGET * (1 - wasted))
    spent = _loss(SURFACE, np.array(factor * n_best), np.array(TARGET / 6 / (factor * n_best)))
    assert _loss(SURFACE, np.array(n), np.array(d)) == pytest.approx(spent, rel=1e-9)
    assert 0 < wasted < 1


def test_wasted_compute_counts_flops_as_the_surface_does() -> None:
    """With 12·N FLOPs a token instead of 6·N the same N is optimal at twice the budget."""
    doubled = LossSurface(surface(SURFACE).loss, lambda c: compute_optimal(SURFACE, c / 2), lambda n: 12 * n)
    assert wasted_compute(doubled, 1e10, 2 * TARGET) == pytest.approx(
        wasted_compute(surface(SURFACE), 1e10, TARGET), rel=1e-9
    )


def test_the_hull_drops_a_run_above_its_neighbours_chord() -> None:
    n = compute_optimal(SURFACE, 1.0)[0] * np.geomspace(1e17, 1e21, 9) ** (0.28 / 0.62)
    data = _points(SURFACE, n, np.geomspace(1e17, 1e21, 9) / 6 / n)
    assert hull_rows(data).all()
    loss = data.loss.copy()
    loss[4] *= 1.02  # still below every run of less compute
    loss[8] = loss[7] * 1.01  # more compute, higher loss
    dented = Points(data.columns, loss, data.cell, data.run_ids)
    assert np.flatnonzero(~hull_rows(dented)).tolist() == [4, 8]
    assert np.flatnonzero(~frontier_rows(dented)).tolist() == [8]
    assert approach_1(dented, "hull")["points"] == 7
    assert approach_1(dented, "hull")["n_exponent"] == pytest.approx(0.28 / 0.62)


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


def test_frontier_and_levels() -> None:
    data = isoflop(SURFACE, 4)
    assert len(np.unique(compute_levels(data))) == 5
    mask = frontier_rows(data)
    assert mask.sum() == 5  # the optimum of each budget
    assert mask[7::15].all()


def test_power_law() -> None:
    x = np.geomspace(1, 1e6, 9)
    assert power_law(x, 3 * x**0.7) == pytest.approx((3, 0.7))
