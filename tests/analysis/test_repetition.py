"""Repeated text: what a sweep's own repeated runs say it is worth, where they do, and what is fitted to the others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.decide.limits import Limits
from analysis.fit import main
from analysis.inference import fit_law
from analysis.inference.repetition import R_TOKENS, Repetition, measure_repetition, split_repeats
from analysis.laws.surface import get_law
from analysis.runs import Runs, load_runs
from scaling.records import Forecast, Plan
from scaling.sweepdir import SweepDir

from .conftest import FAMILY, GRID, MANIFEST, SURFACE, plan_run, write_record

TRUTH = {**SURFACE, "R_D": 6.0, "R_N": 5.31}


def table(epochs: tuple[float, ...], noise: float, seed: int = 0) -> pd.DataFrame:
    """Runs of four sizes and four lengths for each number of epochs, with losses of TRUTH."""
    n, d, e = (x.ravel() for x in np.meshgrid(np.geomspace(2e4, 3e5, 4), np.geomspace(5e5, 8e6, 4), epochs))
    loss = get_law("data_constrained").predict(TRUTH, n, d, unique_tokens=d / e)
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return pd.DataFrame({"n_params": n, "n_tokens": d, "loss": loss, "unique_tokens": d / e})


def load(frame: pd.DataFrame, folder: Path) -> Runs:
    frame.to_csv(folder / "runs.csv", index=False)
    return load_runs(folder / "runs.csv")


def test_the_worth_of_repeated_text_is_recovered_and_the_others_are_fitted(tmp_path: Path) -> None:
    runs = load(table((1, 4, 16), 0.003), tmp_path)
    kept, found = split_repeats(runs)
    assert found is not None
    low, high = found.interval_95
    assert low < TRUTH["R_D"] < high < 2 * low
    assert found.n_runs == 32
    assert len(kept) == 16
    assert (kept.table["n_tokens"] == kept.table["unique_tokens"]).all()
    assert "32 of 48 runs" in kept.notes[-1]
    n, d = 1e5, 1e7
    truth = float(get_law("chinchilla").predict(SURFACE, n, d))
    as_fresh, apart = (float(fit_law(r, draws=20).predict(n, d)) / truth - 1 for r in (runs, kept))
    assert abs(apart) < 0.01 < abs(as_fresh)


def test_a_law_that_knows_repetition_keeps_every_run_and_gives_the_same_worth(tmp_path: Path) -> None:
    runs = load(table((1, 4, 16), 0.003), tmp_path)
    assert split_repeats(runs, "data_constrained") == (runs, None)
    fresh = load(table((1.0, 1.2), 0.003), tmp_path)
    assert split_repeats(fresh) == (fresh, None)


@pytest.mark.parametrize(("epochs", "noise"), [((1.0, 1.6), 0.02), ((1.0, 2.0), 0.03)])
def test_runs_that_do_not_tell_leave_the_published_worth(
    epochs: tuple[float, ...], noise: float, tmp_path: Path
) -> None:
    kept, found = split_repeats(load(table(epochs, noise), tmp_path))
    assert found is None
    assert len(kept) == 16
    assert "do not tell" in kept.notes[-1]


def test_few_runs_tell_nothing_and_few_fresh_ones_are_no_law(tmp_path: Path) -> None:
    frame = table((1, 8), 0.003)
    again = frame["unique_tokens"] < frame["n_tokens"]
    few = load(pd.concat([frame[~again], frame[again].head(3)]), tmp_path)
    assert measure_repetition(few) is None
    assert "too few to tell" in split_repeats(few)[0].notes[-1]
    mostly = load(pd.concat([frame[again], frame[~again].head(2)]), tmp_path)
    kept, _ = split_repeats(mostly)
    assert len(kept) == len(mostly)
    assert "count as fresh" in kept.notes[-1]


def test_an_interval_at_an_end_of_what_r_d_may_be_is_no_answer() -> None:
    assert Repetition(6.0, (4.0, 9.0), 10).identified
    assert not Repetition(0.05, (0.05, 0.06), 10).identified
    assert not Repetition(20.0, (4.0, 90.0), 10).identified


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """make_sweep's grid, and the runs of its upper budgets at 4 and 12 epochs, with losses of TRUTH."""
    made = SweepDir(tmp_path / "sweep")
    fresh = [plan_run(*cell) for cell in GRID]
    again = [
        dataclasses.replace(s, data=dataclasses.replace(s.data, unique_tokens=s.tokens // e, max_epochs=100.0))
        for s in fresh if s.flops > 2e11 and s.seed == 0 for e in (4, 12)
    ]  # fmt: skip
    specs = [*fresh, *again]
    plan = Plan("r", "r", [], "2026-01-01T00:00:00Z", None, FAMILY, {"name": "steplaw"}, MANIFEST, specs)
    plan.write(made.plan_json)
    rng = np.random.default_rng(0)
    for spec in specs:
        unique = spec.data.unique_tokens or spec.tokens
        loss = get_law("data_constrained").predict(TRUTH, spec.params.body_head, spec.tokens, unique_tokens=unique)
        run = made.run(spec.run_id)
        write_record(run, spec, float(loss) * float(np.exp(0.002 * rng.standard_normal())))
        record = json.loads(run.record_json.read_text())
        run.record_json.write_text(json.dumps({**record, "epochs": spec.tokens / unique}))
    return made.path


def test_a_forecast_under_limited_text_says_whose_worth_it_used(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = [
        "--data",
        str(sweep),
        "--law",
        "chinchilla",
        "--draws",
        "20",
        "--budget",
        "1e13",
        "--unique-tokens",
        "1e6",
    ]
    main([*argv, "--out", str(out), "--json", "-"])
    said = json.loads(capsys.readouterr().out)
    (best,) = said["allocations"]
    low, high = said["limits"]["r_tokens_95"]
    assert low < TRUTH["R_D"] < high < R_TOKENS
    assert best["loss_repetition_95"][0] < best["loss"] < best["loss_repetition_95"][1]
    n, d = best["n_params"], best["n_tokens"]
    truth = get_law("data_constrained").predict(TRUTH, n, d, unique_tokens=1e6)
    assert best["loss"] == pytest.approx(float(truth), rel=0.02)
    forecast = Forecast.read(out / "forecast.json")
    assert Limits(**forecast.limits).r_tokens == pytest.approx(said["limits"]["r_tokens"])
    assert any("this sweep's (R_D" in note for note in forecast.notes)
    assert forecast.spec.data.unique_tokens == 1_000_000
    assert all(id not in forecast.run_ids for id in _repeated(sweep))
    seal = forecast.seal
    main([*argv, "--out", str(out), "--json", "-"])
    capsys.readouterr()
    assert Forecast.read(out / "forecast.json").seal == seal
    main(argv)
    assert "loss" in (line := next(x for x in capsys.readouterr().out.splitlines() if "repeated token's worth" in x))
    assert "this sweep's" in line


def _repeated(sweep: Path) -> list[str]:
    return [s.run_id for s in SweepDir(sweep).plan().runs if s.data.unique_tokens]
