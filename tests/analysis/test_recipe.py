"""python -m analysis.recipe: learning-rate and batch laws recovered, checked one size out, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.inference.hyperparameters import cells, fit_batch, fit_lr, fit_parabola, is_separable, one_size_out
from analysis.recipe import main, measure
from analysis.runs import load_runs
from scaling.errors import InputError
from scaling.recipe import recipe_from_dict


def lr_sweep(
    path: Path, *, ray: bool, batches: tuple[float, ...] = (0.5, 1, 2), noise: float = 0.0005, sizes: int = 3
) -> Path:
    """Runs whose optimum is peak_lr = 2·N^−0.5·D^0.2 and batch_tokens = 0.6·D^0.5, each a parabola in the log."""
    rng = np.random.default_rng(0)
    rows = []
    for n in (2e4, 5e4, 1.2e5, 3e5)[:sizes]:
        for d in [12 * n] if ray else [5 * n, 60 * n]:
            best_lr, best_batch = 2 * n**-0.5 * d**0.2, 0.6 * d**0.5
            for b in batches:
                for m in (0.25, 0.5, 1, 2, 4):
                    loss = 3 * (1 + 0.01 * np.log(1.2 * m) ** 2 + 0.005 * np.log(b * 1.1) ** 2)
                    rows.append(
                        (n, d, best_lr * m * 1.2, best_batch * b * 1.1, loss * np.exp(noise * rng.standard_normal()))
                    )
    pd.DataFrame(rows, columns=["n_params", "n_tokens", "peak_lr", "batch_tokens", "loss"]).to_csv(path, index=False)
    return path


def test_parabola_minimum_curvature_and_regret() -> None:
    u = np.log(np.array([0.25, 0.5, 1, 2, 4]))
    found = fit_parabola(u, 3 * np.exp(0.01 * (u - 0.3) ** 2))
    assert found.minimum == pytest.approx(0.3)
    assert found.loss == pytest.approx(3)
    assert found.curvature == pytest.approx(0.02)
    assert found.inside
    assert found.regret(0.3 + np.log(2)) == pytest.approx(0.01 * np.log(2) ** 2)


def test_a_minimum_out_of_range_is_held_at_the_edge_and_said() -> None:
    u = np.log(np.array([0.25, 0.5, 1, 2, 4]))
    found = fit_parabola(u, 3 + 0.01 * (u - 3) ** 2)
    assert found.minimum == pytest.approx(u[-1])
    assert not found.inside


def test_law_is_recovered_where_d_over_n_varies(tmp_path: Path) -> None:
    found = cells(load_runs(lr_sweep(tmp_path / "lr.csv", ray=False)))
    assert len(found) == 6
    assert is_separable(found)
    batch = fit_batch(found)
    lr = fit_lr(found, True, batch)
    assert (lr.n_exponent, lr.d_exponent) == pytest.approx((-0.5, 0.2), abs=0.1)
    assert lr(1e5, 1e6) == pytest.approx(2 * 1e5**-0.5 * 1e6**0.2, rel=0.1)
    assert batch.d_exponent == pytest.approx(0.5, abs=0.1)
    assert max(r["regret"] for r in one_size_out(found, True, batch)) < 0.002


def test_on_one_ray_only_n_is_identified_and_the_planner_reads_the_law(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, out = lr_sweep(tmp_path / "lr.csv", ray=True), tmp_path / "measured.json"
    larger = lr_sweep(tmp_path / "larger.csv", ray=True, sizes=4)
    main([str(sweep), "--verify", str(larger), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "cannot be told apart" in printed
    law = json.loads(out.read_text())
    assert law["peak_lr"]["d_exponent"] == 0
    assert law["peak_lr"]["n_exponent"] == pytest.approx(-0.3, abs=0.05)  # −0.5 + 0.2 along D = 12 N
    assert len(law["one_size_out"]) == 3
    assert law["verified"][-1]["n_params"] == 3e5
    assert law["verified"][-1]["regret"] < 0.001
    rule = recipe_from_dict({"name": "measured", "path": str(out)}).rule
    assert rule.peak_lr(5e4, 6e5, 0) == pytest.approx(2 * 5e4**-0.5 * 6e5**0.2, rel=0.05)
    assert rule.batch_tokens(5e4, 6e5, 0) == pytest.approx(0.6 * 6e5**0.5, rel=0.2)
    assert rule.extrapolation(3e5, 6e5) is not None


def test_one_batch_is_enough_for_the_learning_rate(tmp_path: Path) -> None:
    law = measure(lr_sweep(tmp_path / "lr.csv", ray=True, batches=(1,)), None, "body_head")
    assert law["peak_lr"]["n_exponent"] == pytest.approx(-0.3, abs=0.05)
    assert law["batch_tokens"]["d_exponent"] == pytest.approx(0.5, abs=0.1)
    assert any("no minimum over batch" in note for note in law["notes"])


def test_optima_at_other_batches_are_carried_to_the_batch_law(tmp_path: Path) -> None:
    """peak_lr = N^−.4·(batch / batch*)^.5: each size tried at batches to one side of the best alone."""
    rows = []
    for n, multipliers in ((2e4, (1, 2, 4)), (6e4, (0.25, 0.5, 1)), (2e5, (0.5, 1, 2))):
        d = 10 * n
        for b in multipliers:
            best = n**-0.4 * b**0.5
            for m in (0.25, 0.5, 1, 2, 4):
                loss = 3 * (1 + 0.01 * np.log(m) ** 2 + 0.02 * np.log(b) ** 2)
                rows.append((n, d, best * m, 0.6 * d**0.5 * b, loss))
    frame = pd.DataFrame(rows, columns=["n_params", "n_tokens", "peak_lr", "batch_tokens", "loss"])
    frame.to_csv(tmp_path / "lr.csv", index=False)
    law = measure(tmp_path / "lr.csv", None, "body_head")
    assert law["peak_lr"]["n_exponent"] == pytest.approx(-0.4, abs=0.05)
    assert 6e4 ** law["peak_lr"]["n_exponent"] * law["peak_lr"]["coefficient"] == pytest.approx(6e4**-0.4, rel=0.1)


def test_refusals(tmp_path: Path) -> None:
    one = lr_sweep(tmp_path / "one.csv", ray=True, sizes=1)
    with pytest.raises(InputError, match="one size only"):
        measure(one, None, "body_head")
    frame = pd.read_csv(one)
    frame.drop(columns="peak_lr").to_csv(tmp_path / "no_lr.csv", index=False)
    with pytest.raises(InputError, match="no column peak_lr"):
        measure(tmp_path / "no_lr.csv", None, "body_head")
    frame.iloc[:2].to_csv(tmp_path / "two.csv", index=False)
    with pytest.raises(InputError, match="three or more learning rates"):
        measure(tmp_path / "two.csv", None, "body_head")


def test_step_law(golden: Path, tmp_path: Path) -> None:
    """Parabolas at 17 cells against the paper's N^−.713·D^.307 and D^.571, which came of another estimator."""
    frame = pd.read_csv(golden / "steplaw" / "dense_lr_bs_loss.csv")
    frame = pd.DataFrame(
        {
            "n_params": frame["N"],
            "n_tokens": frame["D"],
            "peak_lr": frame["lr"],
            "batch_tokens": frame["bs"] * 2048,
            "loss": frame["smooth loss"],
        }
    )
    frame.to_csv(tmp_path / "steplaw.csv", index=False)
    law = measure(tmp_path / "steplaw.csv", None, "body_head")
    assert len(law["cells"]) == 17
    assert law["peak_lr"]["n_exponent"] == pytest.approx(-0.713, abs=0.13)
    assert law["peak_lr"]["d_exponent"] == pytest.approx(0.307, abs=0.07)
    assert law["batch_tokens"]["d_exponent"] == pytest.approx(0.571, abs=0.04)
    assert max(r["regret"] for r in law["one_size_out"]) < 0.001
