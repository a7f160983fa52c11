"""Simulated sweeps, and python -m analysis.simulate as a user meets it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.inference.simulate import (
    Cells,
    Grid,
    Noise,
    Surface,
    forecast_error,
    planned_cells,
    published_surface,
    simulate,
    summarise,
    surface_through,
)
from analysis.simulate import main, parse_grid, parse_surface
from scaling.errors import InputError
from scaling.grid import expand_grid

ROOT = Path(__file__).resolve().parents[2]
HOFFMANN = published_surface("hoffmann")
GRID = Grid((1e17, 1e18, 1e19), sizes=7, spread=4.0)


def many_cells(count: int) -> Cells:
    n = np.full(count, 1e8)
    return Cells(n, 20 * n, 120 * n * n, np.arange(count))


def test_a_simulated_sweep_without_noise_lies_on_the_surface() -> None:
    runs = simulate(HOFFMANN, GRID.cells(HOFFMANN), Noise(0.0), 0)
    table = runs.table
    assert len(runs) == 21
    assert table["run_id"].is_unique
    np.testing.assert_allclose(table["loss"], HOFFMANN.loss(table["n_params"], table["n_tokens"]))


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    first, same, other = (simulate(HOFFMANN, GRID.cells(HOFFMANN), Noise(), seed).table for seed in (3, 3, 4))
    assert first.equals(same)
    assert not np.allclose(first["loss"], other["loss"])


def test_noise_has_the_spread_asked_for() -> None:
    cells = many_cells(20_000)
    residual = np.log(simulate(HOFFMANN, cells, Noise(0.02), 0).table["loss"] / HOFFMANN.loss(cells.n, cells.d))
    assert residual.std() == pytest.approx(0.02, rel=0.03)
    assert abs(residual.mean()) < 0.0005


def test_mistuned_runs_are_only_worse_and_as_many_as_asked() -> None:
    cells = many_cells(20_000)
    noise = Noise(0.0, outliers=0.05, outlier_size=(0.02, 0.1))
    rise = (simulate(HOFFMANN, cells, noise, 0).table["loss"] / HOFFMANN.loss(cells.n, cells.d) - 1).to_numpy()
    worse = rise > 1e-9
    assert worse.mean() == pytest.approx(0.05, abs=0.006)
    assert rise[worse].min() >= 0.02 - 1e-9
    assert rise[worse].max() <= 0.1 + 1e-9
    assert np.abs(rise[~worse]).max() < 1e-9


def test_a_grid_is_laid_about_the_optimum_of_each_budget() -> None:
    cells = Grid((1e19, 1e17), sizes=5, spread=4.0, seeds=2).cells(HOFFMANN)
    np.testing.assert_allclose(6 * cells.n * cells.d, cells.flops)
    assert sorted(set(cells.flops)) == pytest.approx([1e17, 1e19])
    for budget in (1e17, 1e19):
        n = np.unique(cells.n[np.isclose(cells.flops, budget)])
        best = HOFFMANN.optimum(budget)[0]
        np.testing.assert_allclose(n / best, [1 / 4, 1 / 2, 1, 2, 4])
    assert len(cells) == 2 * 5 * 2
    assert cells.flops_ratio == pytest.approx(1)


def test_a_drifting_centre_goes_from_first_to_last_evenly_in_log_compute() -> None:
    cells = Grid((1e17, 1e18, 1e19), sizes=1, spread=1.0, centre=(1 / 3, 3.0)).cells(HOFFMANN)
    off = cells.n / [HOFFMANN.optimum(c)[0] for c in cells.flops]
    np.testing.assert_allclose(off, [1 / 3, 1, 3])


@settings(max_examples=50)
@given(ratio=st.floats(1, 100), reducible=st.floats(0.1, 4), alpha=st.floats(0.1, 0.8), beta=st.floats(0.1, 0.8))
def test_a_surface_through_a_point_has_its_optimum_there(
    ratio: float, reducible: float, alpha: float, beta: float
) -> None:
    surface = surface_through(1e20, ratio, reducible, 1.5, alpha, beta)
    n, d = surface.optimum(1e20)
    assert d / n == pytest.approx(ratio, rel=1e-6)
    assert float(surface.loss(n, d)) == pytest.approx(1.5 + reducible)
    assert float(surface.loss(n * 1.1, d / 1.1)) > float(surface.loss(n, d))
    assert float(surface.loss(n / 1.1, d * 1.1)) > float(surface.loss(n, d))


def test_planned_runs_are_those_of_the_sweep(
    make_sweep: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = make_sweep()
    surface = ["--surface", "E=1,A=60,B=100,alpha=.32,beta=.3"]
    main(["--sweep", str(sweep), "--sweeps", "1", "--draws", "2", *surface, "--json", "-"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["grids"][0]["n_runs"] == 19
    cells = planned_cells(expand_grid(["+grid=demo"]).specs)
    assert cells.convention == "exact"
    assert cells.flops_ratio > 1  # attention comes on top of 6·N·D
    assert len(cells) == len({*zip(cells.n, cells.d, cells.seed, strict=True)})


def test_without_noise_the_forecast_is_the_truth() -> None:
    outcome = forecast_error(HOFFMANN, GRID.cells(HOFFMANN), Noise(0.0), 1e21, seed=0, law="chinchilla", draws=5)
    assert abs(outcome.error) < 1e-5
    assert outcome.n_error == pytest.approx(0, abs=1e-3)
    assert outcome.inside_90


def test_less_noise_and_a_nearer_target_make_a_better_forecast() -> None:
    def power(noise: float, target: float) -> tuple[float, float]:
        cells = GRID.cells(HOFFMANN)
        found = [
            forecast_error(HOFFMANN, cells, Noise(noise), target, seed=k, law="chinchilla", draws=30)
            for k in range(8)
        ]
        summary = summarise(cells, target, found)
        return summary.mean_error, summary.half_width_90

    base = power(0.01, 3e20)
    assert power(0.002, 3e20) < base
    nearer = power(0.01, 2e19)
    assert nearer[0] < base[0]
    assert nearer[1] < base[1]


def test_a_frontier_law_has_no_optimum_to_be_off() -> None:
    cells = Grid((1e17, 1e18, 1e19, 1e20), 5, 4.0).cells(HOFFMANN)
    outcome = forecast_error(HOFFMANN, cells, Noise(0.001), 1e21, seed=0, law="frontier", draws=5)
    assert outcome.n_error is None
    summary = summarise(cells, 1e21, [outcome])
    assert summary.n_error is None
    assert summary.no_optimum == 1
    assert summary.laws == {"frontier": 1}


def test_grids_and_surfaces_as_text() -> None:
    grid = parse_grid("1e17:1e21:3x15@8")
    assert grid.budgets == pytest.approx((1e17, 1e19, 1e21))
    assert (grid.sizes, grid.spread) == (15, 8.0)
    assert parse_grid("1e19x9@4") == Grid((1e19,), 9, 4.0)
    given = parse_surface("E=1.69, A=406.4,B=410.7,alpha=.34,beta=.28")
    assert given == Surface({"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28})
    assert parse_surface("Besiroglu").name == "Besiroglu et al. 2024"


def test_side_by_side_at_one_target(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--sizes", "5", "--compare", "1e17:1e20:4x5@4", "--sweeps", "2", "--draws", "5", "--law", "tied"]
    main([*arguments, "--json", "-"])
    text = capsys.readouterr().out
    first, second = json.loads(text)["grids"]
    assert (first["n_runs"], second["n_runs"]) == (25, 20)
    assert first["target_flops"] == second["target_flops"] == pytest.approx(3e20)
    assert second["extrapolation_ratio"] == pytest.approx(3)
    assert second["flops"] == pytest.approx(5 * 1.111e20)
    main([*arguments, "--json", "-"])
    assert capsys.readouterr().out == text
    main(arguments)
    out = capsys.readouterr().out
    for said in ("Hoffmann et al. 2022", "|error|", "in 90%", "1e17:1e20:4x5@4", "2 simulated sweeps", "5.56e20"):
        assert said in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "1e17:1e19:5x9"], "LOW:HIGH:BUDGETSxSIZES@SPREAD"),
        (["--grid", "1e19:1e17:5x9@4"], "0 < LOW < HIGH"),
        (["--grid", "1e17:1e19:1x9@4"], "count of at least 2"),
        (["--grid", "1e17:1e19:5x9@1"], "more than 1"),
        (["--grid", "1e17:1e19:5x9@four"], "'four' is not a number"),
        (["--grid", "1e19x2@4"], "too few"),
        (["--budgets", "1e17,-1e18"], "positive FLOPs"),
        (["--sizes", "0"], "at least 1"),
        (["--centre", "3"], "two numbers with a colon"),
        (["--surface", "hofmann"], "did you mean 'hoffmann et al. 2022'"),
        (["--surface", "E=1.7,A=400"], "give each of E, A, B, alpha, beta once"),
        (["--surface", "E=1.7,A=400,A=3,B=1,alpha=.3,beta=.3"], "each once"),
        (["--surface", "E=1.7,A=x,B=1,alpha=.3,beta=.3"], "'x' is not a number"),
        (["--surface", "E=1.7,A=4,B=1,alpha=-.3,beta=.3"], "alpha = -0.3: must be a positive number"),
        (["--surface", "E=1,A=1e300,B=1e300,alpha=.1,beta=.001"], "a surface that holds at that size"),
        (["--noise", "-0.01"], "standard deviation of ln loss"),
        (["--outliers", "5"], "0.05 is 5%"),
        (["--outlier-size", ".1:.02"], "0 ≤ low ≤ high"),
        (["--sweep", "demoo"], "did you mean 'demo'"),
        (["--sweep", "./absent"], "no sweep directory at ./absent"),
        (["--sweep", "demo", "--sizes", "3"], "go with --grid"),
        (["--target", "0"], "must be a positive number"),
        (["--sweeps", "0"], "--sweeps 0: at least 1"),
        (["--law", "chinchila"], "did you mean 'chinchilla'"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        main([*arguments, *([] if "--sweeps" in arguments else ["--sweeps", "1"]), "--draws", "2"])


def test_the_command_refuses_in_one_line_and_never_loads_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "analysis.simulate", "--sweep", "absent"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown grid 'absent'")
    assert done.stderr.count("\n") == 1
    script = (
        "import sys; from analysis.simulate import main; "
        "main(['--sweep', 'demo', '--surface', 'E=1,A=60,B=100,alpha=.32,beta=.3', '--sweeps', '1', '--draws', '2']); "
        "print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "False False"
