"""python -m analysis.fit as a user meets it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.decide.answer import answer
from analysis.decide.forecast import make_forecast, write_forecast
from analysis.fit import drop, main
from analysis.inference import fit_law
from analysis.inference.points import frontier_rows, points
from analysis.inference.solver import ROBUST, objective
from analysis.laws.surface import LAWS, get_law
from analysis.postmortem import fitted_runs
from analysis.runs import load_runs
from analysis.show.numbers import rounded
from analysis.show.text import answer_text
from scaling.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs_csv(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = ["N,D,loss"]
    for c in (1e17, 3e17, 1e18, 3e18, 1e19):
        for ratio in (0.3, 0.6, 1, 1.7, 3):
            n = (c / 120) ** 0.5 * ratio
            d = c / 6 / n
            lines.append(f"{n},{d},{(1.7 + 400 / n**0.34 + 410 / d**0.28) * np.exp(0.003 * rng.standard_normal())}")
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "analysis.fit", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_json_is_one_object_with_the_promised_keys(runs_csv: Path, tmp_path: Path) -> None:
    points = tmp_path / "points.csv"
    points.write_text("n_params,n_tokens\n1e9,2e10\n")
    done = run(
        "--data", str(runs_csv), "--law", "chinchilla", "--budget", "1e20", "--budget", "1e21",
        "--predict", str(points), "--json", "-",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert {
        "data", "n_runs", "law", "parameters", "objective", "intervals_95", "extrapolation_ratio", "allocations",
        "predictions", "approaches", "backtest", "warnings", "ensemble", "condition", "starts", "diagnostics",
        "conventions", "dropped", "target",
    } <= set(answer)  # fmt: skip
    assert answer["ensemble"] == [{"law": "chinchilla", "emphasis": None, "weight": 1.0}]
    assert answer["starts"]["agreeing"] <= answer["starts"]["tried"]
    assert len(answer["diagnostics"]["residuals"]) == 25
    for row in answer["approaches"]["2"]["allocations"]:
        assert 0 <= row["wasted_compute"] < 0.2
        assert row["n_vs_surface"] == pytest.approx(0, abs=0.5)
    assert [b["budget_flops"] for b in answer["approaches"]["2"]["bias"]["budgets"]] == [1e20, 1e21]
    assert set(answer["parameters"]) == {"E", "A", "B", "alpha", "beta"}
    assert answer["n_runs"] == 25
    assert [a["budget_flops"] for a in answer["allocations"]] == [1e20, 1e21]
    assert set(answer["allocations"][0]) == {
        "budget_flops",
        "n_params",
        "n_tokens",
        "loss",
        "interval_50",
        "interval_90",
        "n_params_90",
        "n_tokens_90",
        "flat",
        "regret",
        "batch_tokens",
        "train_flops",
        "epochs",
        "loss_repetition_95",
        "unlimited",
        "params_total",
        "params_active",
    }
    assert set(answer["predictions"][0]) == {"n_params", "n_tokens", "loss", "interval_50", "interval_90"}
    assert answer["extrapolation_ratio"] == pytest.approx(100, rel=1e-6)
    assert set(answer["approaches"]) == {"1", "2", "3"}
    p = answer["parameters"]
    expected = p["E"] + p["A"] / 1e9 ** p["alpha"] + p["B"] / 2e10 ** p["beta"]
    assert answer["predictions"][0]["loss"] == pytest.approx(expected)


def test_human_answer(runs_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--data", str(runs_csv), "--budget", "1e23", "--draws", "50"])
    out = capsys.readouterr().out
    order = (
        "law chinchilla", "95% interval", "alpha", "what forecasts: a mean", "compute-optimal for a budget", "1e+04× red",
        "three approaches", "IsoFLOP parabolas", "published laws", "Besiroglu", "backtest: fitted", "ensemble, cut by cut",
        "diagnostics", "no run stands out", "warning: 1e+04× the largest run's compute is red",
    )  # fmt: skip
    places = [out.index(text) for text in order]
    assert places == sorted(places)
    assert "\033[" not in out  # no terminal, no colour
    assert max(map(len, out.splitlines())) < 180


def answer_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main([*arguments, "--draws", "50", "--json", "-"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_a_red_extrapolation_is_red_on_a_terminal(runs_csv: Path) -> None:
    runs = load_runs(runs_csv)
    said = answer(fit_law(runs, "chinchilla", draws=20), runs, [1e20, 1e23])
    text = answer_text(said, colour=True)
    assert text.count("\033[31mred\033[0m") == 1
    assert text.replace("\033[31m", "").replace("\033[0m", "") == answer_text(said)


def test_the_target_loss_is_the_allocations_inverse(runs_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for law in ("chinchilla", "auto"):
        data = ("--data", str(runs_csv), "--law", law)
        asked = answer_of(capsys, *data, "--budget", "1e20")["allocations"][0]
        target = answer_of(capsys, *data, "--target-loss", repr(asked["loss"]))["target"]
        assert target["budget_flops"] == pytest.approx(1e20, rel=1e-3)
        assert target["n_params"] == pytest.approx(asked["n_params"], rel=0.02)
        (low, high), (inner_low, inner_high) = target["interval_90"], target["interval_50"]
        assert low < inner_low < 1e20 < inner_high < high
        pessimist = answer_of(capsys, *data, "--budget", repr(high))["allocations"][0]
        assert pessimist["interval_90"][1] == pytest.approx(asked["loss"], rel=1e-3)


@pytest.mark.parametrize(("loss", "said"), [("1.2", "floor of the fit"), ("9", "smallest run's compute")])
def test_a_target_loss_out_of_reach_says_which_is_not(runs_csv: Path, loss: str, said: str) -> None:
    with pytest.raises(InputError, match=rf"{said}.*give a loss between 1.* and 4"):
        main(["--data", str(runs_csv), "--law", "chinchilla", "--target-loss", loss, "--draws", "20"])


def test_the_loss_of_residuals_is_what_was_asked_for(runs_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", str(runs_csv), "--law", "chinchilla", "--loss")
    runs = points(load_runs(runs_csv))
    for name in ROBUST:
        found = answer_of(capsys, *data, name)
        assert found["loss_function"] == name
        at = objective(get_law("chinchilla"), found["parameters"], runs.columns, runs.loss, ROBUST[name])
        assert found["objective"] == pytest.approx(at)


def test_dropped_runs_are_recorded(make_sweep: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    sweep = make_sweep()
    gone, kept = sorted(path.name for path in (sweep / "runs").iterdir())[:2]
    found = answer_of(capsys, "--data", str(sweep), "--drop", gone)
    assert found["dropped"] == [gone]
    assert gone not in [r["run_id"] for r in found["diagnostics"]["residuals"]]
    runs = drop(load_runs(sweep), [gone])
    forecast = make_forecast(fit_law(runs, draws=20), runs, 1e13)
    assert gone not in forecast.run_ids
    assert kept in forecast.run_ids
    assert f"left out by --drop: {gone}" in forecast.notes
    assert set(fitted_runs(forecast, sweep).table["run_id"]) == set(forecast.run_ids)


def test_a_run_that_is_not_there_cannot_be_dropped(runs_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"no such run.*did you mean 'row 2"):
        main(["--data", str(runs_csv), "--drop", "rwo 2"])
    assert answer_of(capsys, "--data", str(runs_csv), "--drop", "row 2,row 3")["dropped"] == ["row 2", "row 3"]


def test_a_sweep_is_fitted_under_every_convention(
    make_sweep: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = str(make_sweep())
    found = answer_of(capsys, "--data", sweep, "--convention", "total", "--flops", "6nd")
    assert found["convention"]["params"] == "total"
    assert found["convention"]["flops"] == "6nd"
    by = {(c["params"], c["flops"]): c for c in found["conventions"]}
    assert len(by) == 9
    assert by["total", "exact"]["alpha"] == by["total", "6nd"]["alpha"]  # the surface does not see C
    assert by["body_head", "exact"]["n_params"] < by["body_head", "6nd"]["n_params"]  # attention costs FLOPs too
    assert by["total", "exact"]["alpha"] != pytest.approx(by["body_head", "exact"]["alpha"], rel=0.02)
    c = by["body_head", "exact"]
    assert c["n_exponent"] == pytest.approx(c["beta"] / (c["alpha"] + c["beta"]))


def test_one_convention_makes_no_table(runs_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer_of(capsys, "--data", str(runs_csv))["conventions"] == []
    main(["--data", str(runs_csv), "--draws", "20"])
    assert "how the exponents move" not in capsys.readouterr().out


def write_runs(path: Path, rows: list[tuple[float, float, float]]) -> str:
    path.write_text("N,D,loss\n" + "".join(f"{n},{d},{loss}\n" for n, d, loss in rows))
    return str(path)


def test_one_ray_has_no_optimum_and_no_false_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = np.geomspace(1e6, 1e9, 12)
    path = write_runs(
        tmp_path / "ray.csv", [(n, 20 * n, 1.7 + 400 / n**0.34 + 410 / (20 * n) ** 0.28) for n in sizes]
    )
    main(["--data", path, "--draws", "20"])
    out = capsys.readouterr().out
    assert "compute-optimal for a budget" not in out
    assert "no N* and D*: the runs lie on one tokens-per-parameter ray" in out
    assert re.search(r"\n  alpha +not identified", out)
    assert re.search(r"\n  A +not identified", out)


def test_a_law_of_more_than_n_and_d_is_fitted_and_not_asked(
    make_sweep: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", str(make_sweep()), "--law", "width_depth")
    found = answer_of(capsys, *data)
    assert found["allocations"] == []
    assert any("needs width, depth beside N and D" in w for w in found["warnings"])
    for asked in (["--target-loss", "3"], ["--hold-out"], ["--out", "nowhere"]):
        with pytest.raises(InputError, match="needs width, depth"):
            main([*data, *asked, "--draws", "20"])


@pytest.mark.parametrize("law", LAWS)
def test_every_law_answers_or_says_what_it_lacks(
    law: str, make_sweep: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = make_sweep()
    data, form = points(load_runs(sweep)), get_law(law)
    data = data.take(frontier_rows(data)) if form.on_frontier else data
    asked = ["--data", str(sweep), "--law", law, "--draws", "5", "--budget", "1e13"]
    if data.n_cells < len(form.free):
        with pytest.raises(InputError, match="too few"):
            main(asked)
    else:
        main(asked)
        assert f"law {law}:" in capsys.readouterr().out


def test_equal_losses_have_no_optimum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_runs(tmp_path / "same.csv", [(n, d, 3.0) for n in (1e6, 3e6, 1e7) for d in (1e8, 3e8, 1e9)])
    found = answer_of(capsys, "--data", path)
    assert found["allocations"] == []
    assert any("is it the right column" in w for w in found["warnings"])
    assert not found["identified"]["alpha"]


def test_as_many_parameters_as_runs_are_not_identified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_runs(tmp_path / "four.csv", [(1e6, 5e6, 9), (2e6, 1e8, 5.5), (4e6, 3e7, 6), (1e7, 1e9, 3.5)])
    main(["--data", path, "--draws", "20"])
    out = capsys.readouterr().out
    assert re.search(r"\n  E +not identified +–", out)
    assert "nothing measures its error" in out


def test_copies_are_left_out_and_said(runs_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = runs_csv.read_text().splitlines()
    once = answer_of(capsys, "--data", str(runs_csv))
    runs_csv.write_text("\n".join([*lines, *lines[1:4]]) + "\n")
    twice = answer_of(capsys, "--data", str(runs_csv))
    assert twice["parameters"] == once["parameters"]
    assert any("3 exact copies" in w for w in twice["warnings"])


def test_parameters_are_written_with_the_digits_that_they_have() -> None:
    assert rounded(0.33918, 0.317, 0.373) == ("0.34", "0.32 – 0.37")
    assert rounded(0.3, 0.1, 0.9) == ("0.3", "0.1 – 0.9")
    assert rounded(477.8, 285, 744) == ("500", "300 – 700")
    assert rounded(2.0, 2.0, 2.0) == ("2", "2 – 2")
    assert rounded(1e-13, 0.0, 3e-13) == ("1e-13", "0 – 3e-13")


def test_sweep_gives_a_sealed_forecast_and_a_report(make_sweep: Callable[..., Path], tmp_path: Path) -> None:
    sweep, out = make_sweep(), tmp_path / "out"
    main(["--data", str(sweep), "--budget", "1e13", "--out", str(out), "--draws", "50"])
    first = (out / "forecast.json").read_bytes()
    assert (out / "report.html").exists()
    assert list((out / "plots").glob("*.png"))
    runs = load_runs(sweep)
    write_forecast(out / "forecast.json", make_forecast(fit_law(runs, draws=50), runs, 1e13))
    assert (out / "forecast.json").read_bytes() == first


def test_default_budget_is_ten_times_the_largest_run(runs_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--data", str(runs_csv), "--draws", "20", "--json", "-"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["allocations"][0]["budget_flops"] == pytest.approx(1e20)


def test_frontier_law_has_no_allocation(runs_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--data", str(runs_csv), "--law", "frontier", "--draws", "20", "--json", "-"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["allocations"] == []
    assert set(answer["parameters"]) == {"L_inf", "a", "s"}


def test_hold_out(runs_csv: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--data", str(runs_csv), "--hold-out", "--draws", "20"])
    out = capsys.readouterr().out
    assert "ensemble fitted on 20 runs up to 3.00e18 FLOPs" in out
    assert "of 5 inside the 50% interval" in out
    main(["--data", str(runs_csv), "--hold-out", "--law", "chinchilla", "--draws", "20"])
    assert "law chinchilla fitted on 20 runs" in capsys.readouterr().out
    main(["--data", str(runs_csv), "--hold-out", "1e18", "--draws", "20", "--json", "-"])
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--law", "chinchila"], "did you mean 'chinchilla'"),
        (["--budget", "-1"], "must be a positive number"),
        (["--columns", "n_params"], "write it as n_params=COL"),
        (["--columns", "loss=nothing"], "unknown column"),
        (["--hold-out", "many"], "a number of FLOPs"),
        (["--predict", "absent.csv"], "no points at"),
        (["--draws", "1"], "at least 2"),
        (["--loss", "hubber"], "did you mean 'huber'"),
        (["--convention", "embedding"], "unknown parameter convention"),
        (["--flops", "7nd"], "unknown FLOPs convention"),
        (["--loss-unit", "bits"], "unknown loss unit"),
    ],
)
def test_bad_arguments_are_one_line(runs_csv: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        main(["--data", str(runs_csv), *arguments])


def test_bad_input_exits_2_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "few.csv"
    path.write_text("N,D,loss\n1e6,2e7,3\n2e6,4e7,2.8\n")
    done = run("--data", str(path), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "too few" in done.stderr
    assert not (tmp_path / "out").exists()


def test_two_budgets_make_no_forecast(make_sweep: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one forecast"):
        main(["--data", str(make_sweep()), "--budget", "1e13", "1e14", "--out", str(tmp_path / "o"), "--draws", "20"])
    assert not (tmp_path / "o" / "forecast.json").exists()


@pytest.mark.slow
def test_the_projects_own_sweep_is_answered_without_torch() -> None:
    script = (
        "import sys; from analysis.fit import main; main(['--budget', '1e23']); "
        "print({'torch', 'matplotlib'} & set(sys.modules))"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True, env=env
    )
    assert done.stdout.splitlines()[-1] == "set()"


def test_help_comes_without_pandas() -> None:
    script = "import sys, analysis.fit; print({'pandas', 'torch', 'matplotlib', 'scipy.optimize'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
