"""Loss-curve laws: exact sums over steps, recovered from curves, and another schedule's curve predicted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis.inference.curves import Curve, best_curve_law, fit_curves, load_curve, run_schedule
from analysis.laws.curves import CURVE_LAWS, Schedule, get_curve_law
from scaling.errors import InputError
from scaling.sweepdir import RunDir

PEAK, WARMUP = 3e-3, 20
TRUE = {
    "annealing": {"L0": 2.5, "A": 0.8, "alpha": 0.45, "C": 1.1, "forgetting": 0.01},
    "multi_power": {"L0": 2.5, "A": 0.8, "alpha": 0.45, "B": 300.0, "C": 1.5, "beta": 0.5, "gamma": 0.6},
}


def schedule(steps: int, decay: float, shape: str = "linear", final: float = 0.0) -> Schedule:
    """Warm-up, constant, and a decay over the last part."""
    lr = np.full(steps, PEAK)
    lr[:WARMUP] = PEAK * np.arange(1, WARMUP + 1) / WARMUP
    falling = round(decay * (steps - WARMUP))
    x = np.arange(1, falling + 1) / falling
    factor = {"linear": 1 - x, "1-sqrt": 1 - np.sqrt(x), "cosine": (1 + np.cos(np.pi * x)) / 2}[shape]
    lr[-falling:] = PEAK * (final + (1 - final) * factor)
    return Schedule(lr, WARMUP)


COSINE, WSD, OTHER = schedule(2000, 1.0, "cosine", 0.1), schedule(2000, 0.2, "1-sqrt"), schedule(1200, 0.5)


def curve(name: str, which: Schedule, noise: float = 0.0, points: int = 40, seed: int = 0) -> Curve:
    steps = np.linspace(WARMUP + 30, len(which.lr), points).astype(int)
    loss = get_curve_law(name, (which,)).predict(TRUE[name], curve=np.zeros(points), step=steps)
    return Curve(which, steps, loss * np.exp(noise * np.random.default_rng(seed).standard_normal(points)))


def test_s2_is_the_double_sum() -> None:
    short = schedule(60, 0.5, "cosine")
    keep = 0.9
    drops = [0.0] * (WARMUP + 1) + [float(short.lr[k - 1] - short.lr[k]) for k in range(WARMUP + 1, 60)]
    direct = [sum(drops[k] * keep ** (i - k) for i in range(s) for k in range(i + 1)) for s in range(61)]
    s2, slope = short.annealing(1 - keep)
    np.testing.assert_allclose(s2, direct, rtol=1e-12, atol=1e-18)
    ahead, behind = short.annealing(1 - keep + 1e-6)[0], short.annealing(1 - keep - 1e-6)[0]
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(short.area, [short.lr[:s].sum() for s in range(61)])


def test_multi_power_is_the_sum_over_steps() -> None:
    """On a schedule with more falling steps than the law has blocks."""
    p = TRUE["multi_power"]
    steps = np.array([100, 700, 1500, 2000])
    direct = []
    for t in steps:
        lr = COSINE.lr[:t]
        loss = p["L0"] + p["A"] * lr.sum() ** -p["alpha"]
        for k in range(WARMUP + 1, t):
            grown = p["C"] * lr[k] ** -p["gamma"] * lr[k:].sum() + 1
            loss -= p["B"] * (lr[k - 1] - lr[k]) * (1 - grown ** -p["beta"])
        direct.append(loss)
    law = get_curve_law("multi_power", (COSINE,))
    np.testing.assert_allclose(law.predict(p, curve=np.zeros(4), step=steps), direct, rtol=2e-4)


@pytest.mark.parametrize("name", CURVE_LAWS)
def test_gradients(name: str) -> None:
    law, p = get_curve_law(name, (COSINE, WSD)), TRUE[name]
    at = {"curve": np.array([0, 0, 1, 1]), "step": np.array([300, 1900, 500, 2000])}
    _, gradient = law.value_and_gradient(p, **at)
    for i, parameter in enumerate(law.free):
        h = 1e-6 * p[parameter]
        ahead, behind = (law.predict({**p, parameter: p[parameter] + s}, **at) for s in (h, -h))
        np.testing.assert_allclose(gradient[:, i], (ahead - behind) / (2 * h), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", CURVE_LAWS)
def test_law_is_recovered_and_predicts_another_schedule(name: str) -> None:
    fit = fit_curves([curve(name, COSINE), curve(name, WSD)], name)
    assert fit.parameters == pytest.approx(TRUE[name], rel=1e-4)
    assert np.abs(fit.errors(curve(name, OTHER))).max() < 1e-6
    noisy = fit_curves([curve(name, COSINE, 2e-3), curve(name, WSD, 2e-3, seed=1)], name)
    assert np.abs(noisy.errors(curve(name, OTHER))).mean() < 2e-3


def test_one_curve_is_enough_where_its_rate_falls() -> None:
    fit = fit_curves([curve("annealing", COSINE)], "annealing", held={"forgetting": 0.01})
    assert fit.parameters["forgetting"] == 0.01
    assert fit.parameters["C"] == pytest.approx(1.1, rel=1e-4)
    assert np.abs(fit.errors(curve("annealing", WSD))).max() < 1e-6


def test_laws_are_judged_on_curves_left_out() -> None:
    curves = [curve("multi_power", s) for s in (COSINE, WSD, OTHER)]
    errors = best_curve_law(curves)
    assert next(iter(errors)) == "multi_power"
    assert errors["multi_power"] < 1e-5 < errors["annealing"]
    with pytest.raises(InputError, match="one curve"):
        best_curve_law(curves[:1])


def test_a_run_gives_its_schedule_and_curve(make_sweep: Callable[..., Path]) -> None:
    run = RunDir(next((make_sweep() / "runs").iterdir()))
    spec = run.spec()
    planned = run_schedule(spec)
    assert len(planned.lr) == spec.steps
    assert planned.lr.max() == pytest.approx(spec.optim.peak_lr)
    assert planned.lr[-1] == pytest.approx(0.0, abs=1e-12)
    assert planned.warmup_steps == spec.schedule.warmup_tokens // spec.batch_tokens
    rows = [
        {"step": 1, "train_loss": 5.0},
        {"step": spec.steps // 2, "val_loss": 3.5},
        {"step": spec.steps, "val_loss": 3.0},
    ]
    run.metrics_jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_curve(run)
    assert found.steps.tolist() == [spec.steps // 2, spec.steps]
    assert found.loss.tolist() == [3.5, 3.0]
    run.metrics_jsonl.write_text("")
    with pytest.raises(InputError, match="no evaluation"):
        load_curve(run)


def test_refusals() -> None:
    flat = Schedule(np.full(500, 1e-3))
    steps = np.arange(100, 500, 20)
    with pytest.raises(InputError, match="falls on none"):
        fit_curves([Curve(flat, steps, 3 + 1 / steps)], "annealing")
    with pytest.raises(InputError, match="7 free parameters"):
        fit_curves([curve("multi_power", COSINE, points=13)])
    with pytest.raises(InputError, match="did you mean 'annealing'"):
        fit_curves([curve("annealing", COSINE)], "anealing")
    with pytest.raises(InputError, match="after warm-up"):
        fit_curves([Curve(COSINE, np.arange(10, 200), np.full(190, 3.0))], "annealing")
    with pytest.raises(InputError, match="must be positive"):
        Curve(COSINE, np.array([100, 200]), np.array([3.0, 0.0]))
    for lr in ([1e-3], [1e-3, -1e-3], [0.0, 0.0], [1e-3, np.nan]):
        with pytest.raises(InputError, match="schedule"):
            Schedule(np.array(lr))
