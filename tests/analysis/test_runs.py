"""Reading runs: what is accepted, how it is counted, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from analysis.inference import fit_law
from analysis.runs import load_points, load_runs
from scaling.errors import InputError
from scaling.sweepdir import SweepDir
from scaling.table import write_runs_csv

HEADER = "N,D,loss\n"
GOOD = "1e6,2e7,3.1\n2e6,4e7,2.9\n"


def _csv(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    return path


def test_sweep_is_counted_by_the_convention_asked_for(make_sweep: Callable[..., Path]) -> None:
    sweep = make_sweep()
    body, total = load_runs(sweep), load_runs(sweep, convention="total")
    assert body.convention == {"params": "body_head", "flops": "exact", "loss": "nats_per_token"}
    spec = body.plan.runs[0] if body.plan else None
    assert spec is not None
    assert body.table["n_params"][0] == spec.params.body_head
    assert total.table["n_params"][0] == spec.params.total
    assert body.table["flops"][0] == pytest.approx(spec.flops)


def test_committed_sweep_without_run_folders_reads_the_same(make_sweep: Callable[..., Path]) -> None:
    sweep = make_sweep()
    from_records = load_runs(sweep)
    write_runs_csv(SweepDir(sweep))
    shutil.rmtree(sweep / "runs")
    from_csv = load_runs(sweep)
    columns = ["run_id", "n_params", "n_tokens", "flops", "loss", "peak_lr", "batch_tokens"]
    pd.testing.assert_frame_equal(from_csv.table[columns], from_records.table[columns], check_dtype=False)
    assert fit_law(from_csv, draws=10).parameters == pytest.approx(
        fit_law(from_records, draws=10).parameters, rel=1e-6
    )


def test_unfinished_and_diverged_runs_are_left_out_and_noted(make_sweep: Callable[..., Path]) -> None:
    sweep = make_sweep()
    runs = load_runs(sweep)
    one, two = runs.table["run_id"][:2]
    (sweep / "runs" / one / "record.json").unlink()
    record = json.loads((sweep / "runs" / two / "record.json").read_text())
    record.update(status="diverged", loss=None)
    (sweep / "runs" / two / "record.json").write_text(json.dumps(record))
    fewer = load_runs(sweep)
    assert len(fewer) == len(runs) - 2
    assert any("1 diverged run" in note for note in fewer.notes)
    assert any("1 of 19 planned runs are not finished" in note for note in fewer.notes)


@pytest.mark.parametrize(
    "header",
    ["Model Size,training tokens,Final Loss", "params,D,val_loss", "n_params,tokens,loss", "param_count,n_tokens,L"],
)
def test_usual_column_names_are_recognised(tmp_path: Path, header: str) -> None:
    runs = load_runs(_csv(tmp_path, header + "\n" + GOOD))
    assert list(runs.table["n_params"]) == [1e6, 2e6]
    assert list(runs.table["flops"]) == [6 * 1e6 * 2e7, 6 * 2e6 * 4e7]


@pytest.mark.parametrize("missing", ["n_params", "n_tokens", "flops"])
def test_any_two_of_n_d_c_are_enough(tmp_path: Path, missing: str) -> None:
    full = pd.DataFrame(
        {"n_params": [1e6, 2e6], "n_tokens": [2e7, 4e7], "flops": [1.2e14, 4.8e14], "loss": [3.1, 2.9]}
    )
    path = tmp_path / "runs.csv"
    full.drop(columns=missing).to_csv(path, index=False)
    runs = load_runs(path)
    assert list(runs.table[missing]) == pytest.approx(list(full[missing]))
    assert runs.notes == (f"{missing} from C = 6·N·D",)


def test_columns_are_mapped(tmp_path: Path) -> None:
    runs = load_runs(_csv(tmp_path, "x,y,z\n" + GOOD), {"n_params": "x", "n_tokens": "y", "loss": "z"})
    assert list(runs.table["loss"]) == [3.1, 2.9]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_parquet_and_json_lines(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame({"N": [1e6, 2e6], "D": [2e7, 4e7], "loss": [3.1, 2.9]})
    path = tmp_path / f"runs{suffix}"
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)
    assert list(load_runs(path).table["loss"]) == [3.1, 2.9]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("N,loss\n1e6,3\n", "no column for n_tokens, flops"),
        ("N,D\n1e6,3e7\n", "no column for flops, loss"),
        (HEADER + GOOD + "1e6,2e7,\n", "row 4, column 'loss': "),
        (HEADER + GOOD + "1e6,-2e7,3\n", "row 4, column 'D': -20000000.0 is not a positive number"),
        (HEADER + "0,2e7,3\n" + GOOD, "row 2, column 'N': "),
        (HEADER + "1e6,2e7,nan\n" + GOOD, "row 2, column 'loss': "),
        (HEADER + "1e6,2e7,inf\n" + GOOD, "row 2, column 'loss': "),
        (HEADER + "big,2e7,3\n" + GOOD, "row 2, column 'N': 'big' is not a positive number"),
        (HEADER, "has no rows"),
        ("", "is empty"),
        ("N,D,loss,status\n1e6,2e7,3,diverged\n", "no run is usable"),
    ],
)
def test_bad_tables_are_refused_by_row_and_column(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_runs(_csv(tmp_path, text))


def test_wrong_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no runs at"):
        load_runs(tmp_path / "absent.csv")
    with pytest.raises(InputError, match=r"no plan\.json"):
        load_runs(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="cannot tell what"):
        load_runs(tmp_path / "a.txt")
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match="cannot read"):
        load_runs(tmp_path / "bad.parquet")
    (tmp_path / "latin.csv").write_bytes(b"N,D,loss\n1e6,2e7,\xff\n")
    with pytest.raises(InputError, match="cannot read"):
        load_runs(tmp_path / "latin.csv")


def test_wrong_mapping_suggests(tmp_path: Path) -> None:
    path = _csv(tmp_path, "size,tokens,loss\n" + GOOD)
    with pytest.raises(InputError, match="did you mean 'size'"):
        load_runs(path, {"n_params": "sizes"})
    with pytest.raises(InputError, match="did you mean 'n_params'"):
        load_runs(path, {"n_param": "size"})


def test_newer_schema_is_refused(make_sweep: Callable[..., Path]) -> None:
    sweep = make_sweep()
    plan = json.loads((sweep / "plan.json").read_text())
    (sweep / "plan.json").write_text(json.dumps({**plan, "schema_version": 99}))
    with pytest.raises(InputError, match="newer isoflop"):
        load_runs(sweep)


def test_sweep_without_a_finished_run(make_sweep: Callable[..., Path]) -> None:
    sweep = make_sweep()
    shutil.rmtree(sweep / "runs")
    with pytest.raises(InputError, match="no finished run yet"):
        load_runs(sweep)


def test_points_to_predict(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("n_params,n_tokens\n1e6,2e7\n")
    assert load_points(path) == [(1e6, 2e7)]
    path.write_text("n_params,n_tokens\n1e6,-1\n")
    with pytest.raises(InputError, match="row 2, column 'n_tokens'"):
        load_points(path)
    path.write_text("n_params,loss\n1e6,1\n")
    with pytest.raises(InputError, match="no column n_tokens"):
        load_points(path)
