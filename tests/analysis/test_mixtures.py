"""Mixture laws: recovered, the known optimum found with its interval, and what is no mixture refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.inference.mixtures import Mixtures, fit_mixtures
from analysis.laws.mixtures import MixtureLaw
from scaling.errors import InputError

DOMAINS = ("web", "code", "books")
T = np.array([[-2.5, -0.3, -0.8], [-0.3, -2.5, -0.3], [-0.3, -0.3, -2.5]])
K, C = np.array([1.0, 1.3, 1.6]), np.array([1.5, 1.85, 2.2])


def losses(r: np.ndarray) -> np.ndarray:
    """(domains, n) of (domains, n) proportions."""
    return C[:, None] + K[:, None] * np.exp(T @ r)


def best_by_grid(weights: np.ndarray, steps: int = 400) -> np.ndarray:
    grid = np.array([(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]).T / steps
    return grid[:, np.argmin(weights @ losses(grid))]


def runs(n: int = 16, noise: float = 0.0, seed: int = 0) -> Mixtures:
    rng = np.random.default_rng(seed)
    r = rng.dirichlet(np.ones(3), size=n).T
    found = losses(r) * np.exp(noise * rng.standard_normal((3, n)))
    return Mixtures(dict(zip(DOMAINS, r, strict=True)), dict(zip(DOMAINS, found, strict=True)))


def test_law_is_recovered_up_to_what_the_simplex_leaves_open() -> None:
    fit = fit_mixtures(runs(), draws=2)
    for i, domain in enumerate(DOMAINS):
        k, t = fit.law.exponents(fit.parameters[domain])
        assert fit.parameters[domain]["c"] == pytest.approx(C[i], rel=1e-5)
        np.testing.assert_allclose(t, T[i] - T[i].mean(), rtol=1e-4)
        assert k == pytest.approx(K[i] * np.exp(T[i].mean()), rel=1e-4)
    at = {d: np.array([0.2, 0.7]) for d in DOMAINS[:2]} | {"books": np.array([0.6, 0.0])}
    at["code"] = 1 - at["web"] - at["books"]
    expected = losses(np.stack([at[d] for d in DOMAINS]))
    np.testing.assert_allclose(np.stack(list(fit.predict(at).values())), expected, rtol=1e-6)


@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 1, 1), (0, 0, 1)])
def test_optimum_is_the_grid_search_s(weights: tuple[float, ...]) -> None:
    optimum = fit_mixtures(runs(), draws=2).optimum(dict(zip(DOMAINS, map(float, weights), strict=True)))
    shares = np.array([optimum.proportions[d] for d in DOMAINS])
    np.testing.assert_allclose(shares, best_by_grid(np.array(weights)), atol=0.004)
    assert optimum.loss == pytest.approx(np.array(weights) @ losses(shares[:, None])[:, 0] / sum(weights), rel=1e-6)
    assert shares.sum() == pytest.approx(1)


def test_interval_holds_the_known_optimum() -> None:
    true = best_by_grid(np.ones(3))
    inside = []
    for seed in range(10):
        optimum = fit_mixtures(runs(20, 0.004, seed), draws=100).optimum()
        inside += [low <= best <= high for best, (low, high) in zip(true, optimum.interval_95.values(), strict=True)]
        assert all(high - low < 0.3 for low, high in optimum.interval_95.values())
    assert sum(inside) >= 25


def test_a_domain_that_runs_out_is_held_at_its_share() -> None:
    optimum = fit_mixtures(runs(), draws=2).optimum(at_most={"books": 0.3})
    assert optimum.proportions["books"] == pytest.approx(0.3, abs=1e-6)
    assert sum(optimum.proportions.values()) == pytest.approx(1)


def test_columns_of_a_table() -> None:
    given = runs()
    table = pd.DataFrame(
        {f"r_{d}": given.proportions[d] for d in DOMAINS} | {f"loss_{d}": given.losses[d] for d in DOMAINS}
    )
    read = Mixtures.from_table(table)
    assert tuple(read.proportions) == tuple(read.losses) == DOMAINS
    with pytest.raises(InputError, match="r_<domain>"):
        Mixtures.from_table(table.drop(columns=[f"r_{d}" for d in DOMAINS]))


def test_gradient_and_curvature() -> None:
    law = MixtureLaw(DOMAINS)
    columns = {f"r_{d}": v for d, v in runs(5).proportions.items()}
    model, p, weight = law.bind(columns), np.array([[1.5, -1.0, 0.3, -0.4]]), np.arange(1.0, 6.0)[None]
    at = model.evaluate(p)
    second = model.curvature(p, at, weight)
    assert second is not None
    for i in range(4):
        h = np.zeros((1, 4))
        h[0, i] = 1e-6
        ahead, behind = model.evaluate(p + h), model.evaluate(p - h)
        np.testing.assert_allclose(at.jacobian[0, i], (ahead.y - behind.y)[0] / 2e-6, rtol=1e-6, atol=1e-8)
        slope = ((ahead.jacobian - behind.jacobian)[0] / 2e-6) @ weight[0]
        np.testing.assert_allclose(second[0, i], slope, rtol=1e-6, atol=1e-8)


def test_refusals() -> None:
    good = runs()
    percent = {d: 100 * v for d, v in good.proportions.items()}
    with pytest.raises(InputError, match="sum to 100"):
        Mixtures(percent, good.losses)
    one = {d: np.full(16, v) for d, v in zip(DOMAINS, (0.5, 0.3, 0.2), strict=True)}
    with pytest.raises(InputError, match=r"16 runs with 1 different mixtures .* 0 directions"):
        Mixtures(one, good.losses)
    line = {"web": good.proportions["web"], "code": (1 - good.proportions["web"]) / 2}
    with pytest.raises(InputError, match="1 directions of 2"):
        Mixtures({**line, "books": line["code"]}, good.losses)
    with pytest.raises(InputError, match="not negative"):
        Mixtures({"web": np.array([1.5, 0.2]), "code": np.array([-0.5, 0.8])}, {"web": np.array([3.0, 3.1])})
    with pytest.raises(InputError, match="3 different mixtures for 4 parameters"):
        Mixtures({d: v[:3] for d, v in good.proportions.items()}, {"web": good.losses["web"][:3]})
    with pytest.raises(InputError, match="losses of 'web'"):
        Mixtures(good.proportions, {"web": good.losses["web"][:5]})
    fit = fit_mixtures(good, draws=2)
    with pytest.raises(InputError, match="unknown evaluated domain 'wiki'"):
        fit.optimum({"wiki": 1.0})
    with pytest.raises(InputError, match="must reach 1"):
        fit.optimum(at_most={"web": 0.1, "code": 0.1, "books": 0.1})
    with pytest.raises(InputError, match="all 0"):
        fit.optimum({"web": 0.0})
