"""The solver: known surfaces recovered, the published minimum reached, bounds honoured."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.inference.solver import HUBER_DELTA, huber, resolve, solve
from analysis.laws import Floats, get_law
from analysis.laws.law import complete


def _grid() -> tuple[Floats, Floats]:
    budgets, ratios = np.meshgrid(np.geomspace(1e17, 1e21, 5), np.geomspace(1 / 8, 8, 9))
    n = np.sqrt(budgets / 6 / 20).ravel() * ratios.ravel()
    return n, budgets.ravel() / 6 / n


def _columns(n: Floats, d: Floats) -> dict[str, Floats]:
    return complete({"n_params": n, "n_tokens": d})


def epoch(golden: Path) -> tuple[dict[str, Floats], Floats]:
    """The 240 points of lowest loss, in the file's order."""
    frame = pd.read_csv(golden / "epoch_svg" / "points.csv")
    frame = frame.drop(frame["loss"].nlargest(5).index)
    n, c = frame["Model Size"].to_numpy(float), frame["Training FLOP"].to_numpy(float)
    return _columns(n, c / (6 * n)), frame["loss"].to_numpy(float)


@settings(max_examples=40)
@given(
    e=st.floats(0.5, 2.5), alpha=st.floats(0.15, 0.6), beta=st.floats(0.15, 0.6), share=st.floats(0.2, 0.8)
)  # fmt: skip
def test_noise_free_surfaces_are_recovered(e: float, alpha: float, beta: float, share: float) -> None:
    n, d = _grid()
    a, b = share * 2 * np.median(n) ** alpha, (1 - share) * 2 * np.median(d) ** beta
    loss = e + a * n**-alpha + b * d**-beta
    found = solve(get_law("chinchilla"), _columns(n, d), loss)
    assert found.objective[0] < 1e-18
    assert found.converged[0]
    assert found.values[0] == pytest.approx([e, a, b, alpha, beta], rel=1e-4)


def test_epoch_points_reach_the_published_minimum(golden: Path) -> None:
    x, loss = epoch(golden)
    law = get_law("chinchilla")
    found = solve(law, x, loss)
    assert found.objective[0] <= 0.00101827402
    assert found.converged[0]
    p = law.parameters(found.values[0])
    assert p["E"] == pytest.approx(1.81722, abs=1e-5)
    assert p["A"] == pytest.approx(477.826, abs=0.01)
    assert p["B"] == pytest.approx(2143.417, abs=0.05)
    assert (p["alpha"], p["beta"]) == pytest.approx((0.347310, 0.367172), abs=2e-6)
    started = time.process_time()
    solve(law, x, loss)
    assert time.process_time() - started < 0.2  # 10 ms here; slack for a busy machine


def test_bootstrap_of_the_epoch_points_is_the_published_one(golden: Path) -> None:
    """The very resamples of Besiroglu et al. 2024: rows in the file's order, numpy's generator from 42, 4,000 draws."""
    x, loss = epoch(golden)
    law = get_law("chinchilla")
    best = solve(law, x, loss).values[0]
    legacy = np.random.RandomState(42)
    weights = np.stack([np.bincount(legacy.choice(240, 240), minlength=240) for _ in range(4000)]).astype(float)
    started = time.process_time()
    refit = resolve(law, x, loss, best, weights)
    assert time.process_time() - started < 2.0  # .4 s here; slack for a busy machine
    assert refit.converged.all()
    error = dict(zip(law.free, refit.values.std(0), strict=True))
    assert error["A"] == pytest.approx(124.5, rel=0.02)
    assert error["B"] == pytest.approx(1296, rel=0.02)
    assert (error["E"], error["alpha"], error["beta"]) == pytest.approx((0.0257, 0.0154, 0.0206), abs=1e-4)
    low, high = np.quantile(refit.values, (0.025, 0.975), axis=0)
    published = {
        "E": (1.769, 1.871), "A": (285, 744), "B": (1042, 5810), "alpha": (0.317, 0.373), "beta": (0.331, 0.415),
    }  # fmt: skip
    for i, name in enumerate(law.free):
        tolerance = {"rel": 0.02} if name in "AB" else {"abs": 6e-4}
        assert (low[i], high[i]) == pytest.approx(published[name], **tolerance)


def test_the_minimum_is_stationary_and_no_start_beats_it() -> None:
    rng = np.random.default_rng(3)
    n, d = _grid()
    loss = (1.7 + 400 / n**0.34 + 410 / d**0.28) * np.exp(0.01 * rng.standard_normal(len(n)))
    law, x = get_law("chinchilla"), _columns(n, d)
    best = solve(law, x, loss)

    def objective(v: Floats) -> float:
        return float(huber(np.log(law.predict(law.parameters(v), n, d) / loss), HUBER_DELTA).sum())

    assert objective(best.values[0]) == pytest.approx(best.objective[0], rel=1e-9)
    for _ in range(200):
        moved = best.values[0] * np.exp(1e-3 * rng.standard_normal(5))
        assert objective(moved) >= best.objective[0] * (1 - 1e-9)


def test_a_floor_that_data_deny_is_zero_not_negative() -> None:
    n, d = _grid()
    loss = np.exp(-0.004 * np.log(6 * n * d / 1e17) ** 2) * (200 / n**0.25 + 200 / d**0.25)  # bends below a power law
    law = get_law("chinchilla")
    found = solve(law, _columns(n, d), loss)
    p = law.parameters(found.values[0])
    assert p["E"] == 0
    pinned = solve(get_law("chinchilla_no_floor"), _columns(n, d), loss)
    assert found.objective[0] == pytest.approx(pinned.objective[0], rel=1e-6)


def test_unit_weights_give_the_fit_and_repeated_rows_equal_weights() -> None:
    rng = np.random.default_rng(0)
    n, d = _grid()
    loss = (1.7 + 400 / n**0.34 + 410 / d**0.28) * np.exp(0.01 * rng.standard_normal(len(n)))
    law, x = get_law("chinchilla"), _columns(n, d)
    best = solve(law, x, loss)
    counts = rng.multinomial(len(n), np.full(len(n), 1 / len(n)), size=2).astype(float)
    refit = resolve(law, x, loss, best.values[0], np.vstack([np.ones(len(n)), counts]))
    assert refit.values[0] == pytest.approx(best.values[0], rel=1e-6)
    rows = np.repeat(np.arange(len(n)), counts[0].astype(int))
    repeated = solve(law, {k: v[rows] for k, v in x.items()}, loss[rows])
    assert refit.objective[1] == pytest.approx(repeated.objective[0], rel=1e-6)


@pytest.mark.parametrize("name", ["frontier", "frontier_no_floor", "tied", "tied_no_floor", "chinchilla_no_floor"])
def test_every_law_is_recovered_from_its_own_predictions(name: str) -> None:
    law = get_law(name)
    true = law.parameters({"frontier": [1.6, 95.18, 0.0941], "frontier_no_floor": [90.0, 0.09]}.get(
        name, [*([1.5] if "E" in law.free else []), 300.0, 500.0, 0.3, *([0.35] if "beta" in law.free else [])]
    ))  # fmt: skip
    n, d = _grid()
    found = solve(law, _columns(n, d), law.predict(true, n, d))
    assert law.parameters(found.values[0]) == pytest.approx(true, rel=1e-4, abs=1e-9)


# Properties ----------------------------------------------------------------------------------------------------------

LAW = get_law("chinchilla")


def _noisy(seed: int) -> tuple[Floats, Floats, Floats]:
    n, d = _grid()
    noise = np.exp(0.01 * np.random.default_rng(seed).standard_normal(len(n)))
    return n, d, (1.7 + 400 / n**0.34 + 410 / d**0.28) * noise


@settings(max_examples=20)
@given(seed=st.integers(0, 50), by_n=st.floats(1e-3, 1e3), by_d=st.floats(1e-3, 1e3))
def test_other_units_of_n_and_d_change_their_coefficients_alone(seed: int, by_n: float, by_d: float) -> None:
    """A → A·by_n^α and B → B·by_d^β."""
    n, d, loss = _noisy(seed)
    one = solve(LAW, _columns(n, d), loss)
    two = solve(LAW, _columns(by_n * n, by_d * d), loss)
    e, a, b, alpha, beta = one.values[0]
    assert two.objective[0] == pytest.approx(one.objective[0], rel=1e-8)
    assert two.values[0] == pytest.approx([e, a * by_n**alpha, b * by_d**beta, alpha, beta], rel=1e-3)


@settings(max_examples=20)
@given(seed=st.integers(0, 50), order=st.randoms(use_true_random=False), copies=st.integers(2, 4))
def test_order_is_nothing_and_copies_multiply_the_objective(seed: int, order: random.Random, copies: int) -> None:
    n, d, loss = _noisy(seed)
    one = solve(LAW, _columns(n, d), loss)
    rows = list(range(len(n))) * copies
    order.shuffle(rows)
    many = solve(LAW, _columns(n[rows], d[rows]), loss[rows])
    assert many.objective[0] == pytest.approx(copies * one.objective[0], rel=1e-8)
    assert many.values[0] == pytest.approx(one.values[0], rel=1e-3)
    again = solve(LAW, _columns(n, d), loss)
    assert np.array_equal(again.values, one.values)


@settings(max_examples=20)
@given(seed=st.integers(0, 50), data=st.data())
def test_a_weight_of_zero_leaves_a_run_out(seed: int, data: st.DataObject) -> None:
    n, d, loss = _noisy(seed)
    kept = np.ones(len(n), bool)
    kept[data.draw(st.lists(st.integers(0, len(n) - 1), max_size=12))] = False
    wild = np.where(kept, loss, data.draw(st.floats(0.1, 1e3)))
    weighted = solve(LAW, _columns(n, d), wild, weights=kept.astype(float))
    without = solve(LAW, _columns(n[kept], d[kept]), loss[kept])
    assert weighted.objective[0] == pytest.approx(without.objective[0], rel=1e-6)
    assert weighted.values[0] == pytest.approx(without.values[0], rel=1e-3)


@settings(max_examples=20)
@given(extra=st.lists(st.tuples(st.floats(6, 11), st.floats(8, 13)), min_size=1, max_size=20))
def test_more_runs_without_noise_change_nothing(extra: list[tuple[float, float]]) -> None:
    n, d = _grid()
    more_n, more_d = 10.0 ** np.array(extra).T
    n, d = np.concatenate([n, more_n]), np.concatenate([d, more_d])
    found = solve(LAW, _columns(n, d), 1.7 + 400 / n**0.34 + 410 / d**0.28)
    assert found.converged[0]
    assert found.values[0] == pytest.approx([1.7, 400, 410, 0.34, 0.28], rel=1e-5)


@pytest.mark.filterwarnings("error")
@settings(max_examples=30)
@given(
    name=st.sampled_from(["chinchilla", "gamma", "kaplan", "data_constrained", "broken", "farseer", "precision"]),
    loss=st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=12),
)
def test_losses_that_no_law_describes_raise_no_warning_and_have_a_finite_fit(name: str, loss: list[float]) -> None:
    n, d = (v[:: len(v) // len(loss)][: len(loss)] for v in _grid())
    found = solve(get_law(name), _columns(n, d), np.array(loss))
    assert np.isfinite(found.objective[0])
    assert np.isfinite(found.values).all()
