"""python -m analysis.fit as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis.fit import main
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
        "predictions", "approaches", "backtest", "warnings",
    } <= set(answer)  # fmt: skip
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
    for text in (
        "law chinchilla",
        "alpha",
        "95% interval",
        "1e+04× red",
        "Besiroglu",
        "backtest",
        "IsoFLOP parabolas",
    ):
        assert text in out


def test_sweep_gives_a_sealed_forecast_and_a_report(make_sweep: Callable[..., Path], tmp_path: Path) -> None:
    sweep, out = make_sweep(), tmp_path / "out"
    main(["--data", str(sweep), "--budget", "1e13", "--out", str(out), "--draws", "50"])
    first = (out / "forecast.json").read_bytes()
    assert (out / "report.html").exists()
    assert list((out / "plots").glob("*.png"))
    main(["--data", str(sweep), "--budget", "1e13", "--out", str(out), "--draws", "50"])
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
    assert "law chinchilla fitted on 20 runs up to 3.00e18 FLOPs" in out
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
def test_answers_within_three_seconds_of_cpu_without_torch(make_sweep: Callable[..., Path]) -> None:
    script = (
        "import sys, time; from analysis.fit import main; "
        f"main(['--data', {str(make_sweep())!r}, '--budget', '1e23']); "
        "print('torch' in sys.modules, 'matplotlib' in sys.modules, time.process_time())"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    torch, matplotlib, cpu_s = done.stdout.splitlines()[-1].split()
    assert (torch, matplotlib) == ("False", "False")
    assert float(cpu_s) < 3, f"{time.monotonic() - started:.1f} s in all"
