"""The next runs: rank-one updates, what is bought, and the grid file that comes out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis import design as entry
from analysis.decide.design import (
    MAX_SEEDS,
    Candidates,
    _Information,
    _State,
    aim,
    choose_largest,
    choose_runs,
    family_candidates,
    levels,
    recentred_widths,
)
from analysis.inference import FitResult, fit_law
from analysis.inference.points import Points, points
from analysis.inference.simulate import Grid, Noise, Surface, simulate
from analysis.inference.uncertainty import FormError
from analysis.runs import load_runs
from scaling.compose import read_grid_file
from scaling.errors import InputError
from scaling.grid import Grid as GridFile
from scaling.grid import expand_grid

SURFACE = Surface({"E": 1.7, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.36})
TARGET_FLOPS = 1e21


@pytest.fixture(scope="module")
def pilot() -> tuple[FitResult, Points, Candidates]:
    """An ensemble fitted to a small grid of 1% noise, and cells up to 16 times its largest compute."""
    grid = Grid(tuple(np.geomspace(1e17, 1e19, 4)), 5, 4.0)
    runs = simulate(SURFACE, grid.cells(SURFACE), Noise(0.01), 0)
    flops, n = np.meshgrid(levels(1.6e20, 1e17), np.geomspace(1e7, 1e10, 25))
    d = flops / 6 / n
    legal = (d / n > 2) & (d / n < 200)
    n, d, flops = n[legal], d[legal], flops[legal]
    return fit_law(runs, draws=50), points(runs), Candidates(n, d, flops, flops, np.zeros(len(n), int))


def test_a_rank_one_update_is_the_information_with_that_run() -> None:
    rng = np.random.default_rng(1)
    runs, new, target = rng.standard_normal((9, 4)), rng.standard_normal((3, 4)), rng.standard_normal(4)
    w, w_new = rng.uniform(0.1, 1, 9), np.array([0.5, 3.0, 0.01])
    found = _Information(runs, new, target, w, w_new, 0.01)
    expected = [
        _Information(np.vstack([runs, new[[i]]]), new, target, np.append(w, w_new[i]), w_new, 0.01).variance()
        for i in range(3)
    ]
    np.testing.assert_allclose(found.variance_with(), expected, rtol=1e-9)
    found.add(1)
    assert found.variance() == pytest.approx(expected[1], rel=1e-9)


def test_what_a_run_is_said_to_bring_is_what_it_brings(pilot: tuple[FitResult, Points, Candidates]) -> None:
    fit, data, candidates = pilot
    state = _State(fit, data, candidates, aim(fit, None, data, TARGET_FLOPS))
    said = state.variance_with()
    for i in (0, len(candidates) // 2, len(candidates) - 1):
        with_run = state.copy()
        with_run.add(i)
        assert with_run.variance() == pytest.approx(said[i], rel=1e-9)
    assert state.variance_with() == pytest.approx(said)


def test_the_budget_goes_to_runs_that_beat_random_ones(pilot: tuple[FitResult, Points, Candidates]) -> None:
    fit, data, candidates = pilot
    target, budget = aim(fit, None, data, TARGET_FLOPS), 1e21
    design = choose_runs(fit, data, candidates, target, budget)
    spent = float(design.seeds @ candidates.cost)
    assert 0.95 * budget < spent <= budget
    assert design.seeds.max() <= MAX_SEEDS
    assert design.sd_after < 0.6 * design.sd_before
    rng = np.random.default_rng(0)
    for _ in range(50):
        state, left = _State(fit, data, candidates, target), budget
        for i in rng.permutation(np.repeat(np.arange(len(candidates)), MAX_SEEDS)):
            if candidates.cost[i] <= left:
                state.add(int(i))
                left -= candidates.cost[i]
        assert design.sd_after < np.sqrt(state.variance())


def test_where_the_laws_form_fails_runs_reach_as_far_as_they_may(pilot: tuple[FitResult, Points, Candidates]) -> None:
    fit, data, c = pilot
    near, far = (
        Candidates(*(getattr(c, k)[c.flops <= most] for k in ("n", "d", "flops", "cost", "seeds_done")))
        for most in (8e19, 1.6e20)
    )
    target = aim(fit, None, data, TARGET_FLOPS)
    for per_efold, wanted in ((0.0, near), (0.02, far)):
        design, chosen = choose_largest(
            dataclasses.replace(fit, form=FormError(per_efold, 3)), data, [near, far], target, 3e20
        )
        assert chosen is wanted
        assert design.seeds @ chosen.cost <= 3e20
    assert choose_largest(fit, data, [far, near], target, near.cost.max() * 1.5)[0].seeds.any()


def test_cells_that_were_run_often_enough_are_left_alone(pilot: tuple[FitResult, Points, Candidates]) -> None:
    fit, data, c = pilot
    done = np.where(c.flops > 1e20, MAX_SEEDS, 0)
    design = choose_runs(fit, data, Candidates(c.n, c.d, c.flops, c.cost, done), (3e9, 5e10), 1e20)
    assert design.seeds.any()
    assert not design.seeds[c.flops > 1e20].any()


def test_the_cheap_runs_of_a_plan_come_first(pilot: tuple[FitResult, Points, Candidates]) -> None:
    fit, data, candidates = pilot
    design = choose_runs(fit, data, candidates, aim(fit, None, data, TARGET_FLOPS), 1e21)
    some = design.cheapest(candidates, 3e20)
    rest = design.seeds - some
    assert (rest >= 0).all()
    assert 0 < some @ candidates.cost <= 3e20
    assert candidates.cost[some > 0].max() <= candidates.cost[rest > 0].min()
    assert (design.cheapest(candidates, 1e21) == design.seeds).all()


def test_a_budget_that_buys_nothing_is_refused(pilot: tuple[FitResult, Points, Candidates]) -> None:
    fit, data, candidates = pilot
    with pytest.raises(InputError, match=r"buys none of \d+ candidate runs \(the cheapest costs"):
        choose_runs(fit, data, candidates, (1e9, 1e10), 1e10)


def test_candidates_of_a_sweep_are_its_own_kind_of_run(make_sweep: Callable[..., Path]) -> None:
    runs = load_runs(make_sweep())
    assert runs.plan is not None
    fit, data = fit_law(runs, draws=20), points(runs)
    found = family_candidates(fit, runs.plan, data, 1e12, 1e12)
    ratio = runs.table["n_tokens"] / runs.table["n_params"]
    assert (found.d / found.n > 0.97 * ratio.min()).all()
    assert (found.d / found.n < 1.03 * ratio.max()).all()
    assert found.seeds_done.max() == 1  # the level of 1e12 FLOPs is the sweep's own
    assert {s.shape for s in found.specs if s.shape.width == 40} == {runs.plan.family.shape(40)}
    np.testing.assert_allclose(found.cost, [s.flops for s in found.specs])


def test_sizes_move_to_the_fitted_optimum(make_sweep: Callable[..., Path]) -> None:
    runs = load_runs(make_sweep(noise=0.0005))
    assert runs.plan is not None
    fit = fit_law(runs, draws=2)
    off = recentred_widths(fit, runs.plan, 2e12, [16, 24, 32, 40])
    on = recentred_widths(fit, runs.plan, 2e12, off)
    assert len(off) == 4
    assert np.mean(off) > 28
    assert abs(np.mean(on) - np.mean(off)) <= 24


def test_the_command_writes_a_grid_that_the_planner_reads(
    make_sweep: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, out = make_sweep(), tmp_path / "next.yaml"
    options = ["--target", "3e13", "--budget-flops", "4e12", "--out", str(out), "--json", "-"]
    assert entry.main([str(sweep), *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    grid = GridFile(**read_grid_file(out))
    assert grid.target_flops == 3e13
    specs = expand_grid([f"+grid={out}", "recipe=steplaw"]).specs
    assert len(specs) == answer["runs"]
    assert sum(s.flops for s in specs) == pytest.approx(answer["cost"], rel=0.01)
    assert answer["cost"] <= 4e12
    assert 0 < answer["sd_after"] < answer["sd_before"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget-flops", "1e12"], "give --target C and exactly one"),
        (["--target", "1e13", "--budget-flops", "1e12", "--budget-hours", "1"], "exactly one"),
        (["--target", "nan", "--budget-flops", "1e12"], "--target nan: must be a positive number"),
        (["--recentre", "1e12", "--widths", "a,b"], "--widths 'a,b': whole numbers"),
    ],
)
def test_bad_options(make_sweep: Callable[..., Path], tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        entry.main([str(make_sweep()), *options, "--out", str(tmp_path / "x.yaml")])
