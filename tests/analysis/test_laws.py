"""Laws as values: formulas, gradients, the compute-optimal point, published tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.laws import LAWS, PUBLISHED, compute_optimal, get_law
from scaling.errors import InputError

exponent = st.floats(0.05, 1.0)
coefficient = st.floats(0.1, 1e4)


@given(name=st.sampled_from(sorted(LAWS)), data=st.data(), n=st.floats(1e4, 1e12), d=st.floats(1e5, 1e14))
def test_gradient_agrees_with_finite_differences(name: str, data: st.DataObject, n: float, d: float) -> None:
    law = get_law(name)
    values = [data.draw(coefficient if q.linear or q.name in "AB" else exponent) for q in law.domain]
    _, gradient = law.value_and_gradient(law.parameters(values), n, d)
    for i, value in enumerate(values):
        step = 1e-6 * value
        ends = [law.predict(law.parameters([*values[:i], value + s, *values[i + 1 :]]), n, d) for s in (-step, step)]
        numeric = (ends[1] - ends[0]) / (2 * step)
        scale = max(abs(float(gradient[i])), float(ends[0]) / value)
        assert gradient[i] == pytest.approx(numeric, rel=1e-4, abs=1e-6 * scale)


def test_formulas() -> None:
    p = {"E": 1.7, "A": 400.0, "B": 410.0, "alpha": 0.34, "beta": 0.28}
    assert get_law("chinchilla").predict(p, 1e9, 2e10) == pytest.approx(1.7 + 400 / 1e9**0.34 + 410 / 2e10**0.28)
    f = get_law("frontier")
    assert f.predict({"L_inf": 1.6, "a": 95.18, "s": 0.0941}, 1e9, 2e10, 1e23) == pytest.approx(2.252, abs=2e-3)


def test_special_cases_name_all_of_chinchillas_parameters() -> None:
    assert get_law("tied_no_floor").parameters([2.0, 3.0, 0.3]) == {
        "E": 0.0, "A": 2.0, "B": 3.0, "alpha": 0.3, "beta": 0.3,
    }  # fmt: skip


@given(
    a=st.floats(10, 1e4), b=st.floats(10, 1e4), alpha=exponent, beta=exponent, budget=st.floats(1e10, 1e26)
)  # fmt: skip
def test_compute_optimal_is_a_minimum_on_the_budget(
    a: float, b: float, alpha: float, beta: float, budget: float
) -> None:
    p = {"E": 1.0, "A": a, "B": b, "alpha": alpha, "beta": beta}
    n, d = compute_optimal(p, budget)
    assert 6 * n * d == pytest.approx(budget)
    law = get_law("chinchilla")
    best = law.predict(p, n, d)
    for factor in (0.9, 1.1):
        assert law.predict(p, n * factor, d / factor) >= best * (1 - 1e-12)


def test_hoffmann_approach_3_at_gophers_budget() -> None:
    hoffmann = PUBLISHED[0]
    n, _, _ = hoffmann.allocate(5.76e23)
    assert n == pytest.approx(40e9, rel=0.02)
    rounded = {**hoffmann.parameters, "alpha": 0.34, "beta": 0.28}
    assert compute_optimal(rounded, 5.76e23)[0] == pytest.approx(32e9, rel=0.03)


def test_besiroglu_exponent() -> None:
    p = PUBLISHED[1].parameters
    assert p["beta"] / (p["alpha"] + p["beta"]) == pytest.approx(0.513, abs=5e-4)


def test_unknown_law_and_missing_term() -> None:
    with pytest.raises(InputError, match="did you mean 'chinchilla'"):
        get_law("chinchila")
    with pytest.raises(InputError, match="one term is missing"):
        compute_optimal({"E": 1, "A": 0, "B": 1, "alpha": 0.3, "beta": 0.3}, 1e20)
