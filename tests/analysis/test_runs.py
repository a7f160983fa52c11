"""Reading runs: what is accepted, how it is counted, and what is refused with which words."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.inference import fit_law
from analysis.runs import conventions, join_runs, load_points, load_runs
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


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".tsv", ".csv.gz", ".csv.zst"])
def test_kinds_of_file(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame({"N": [1e6, 2e6], "D": [2e7, 4e7], "loss": [3.1, 2.9], "run_id": ["007", "1e5"]})
    path = tmp_path / f"runs{suffix}"
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
        frame.set_index("N").to_parquet(path)  # an index is a column too
    else:
        lines = ".jsonl" in suffix
        text = (
            frame.to_json(orient="records", lines=True)
            if lines
            else frame.to_csv(index=False, sep=_delimiter(suffix))
        )
        path.write_bytes(_pack(text.encode(), suffix))
    table = load_runs(path).table
    assert list(table["loss"]) == [3.1, 2.9]
    assert list(table["run_id"]) == ["007", "1e5"]


def _delimiter(suffix: str) -> str:
    return "\t" if suffix == ".tsv" else ","


def _pack(content: bytes, suffix: str) -> bytes:
    if suffix.endswith(".gz"):
        return gzip.compress(content)
    if suffix.endswith(".zst"):
        return pytest.importorskip("zstandard").ZstdCompressor().compress(content)  # type: ignore[no-any-return]
    return content


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


def test_which_of_two_columns_is_said(tmp_path: Path) -> None:
    runs = load_runs(
        _csv(tmp_path, "params,n_params_total,D,loss,val_loss\n1e6,2e6,2e7,3.1,3.2\n2e6,3e6,4e7,2.9,3.0\n")
    )
    assert list(runs.table["n_params"]) == [1e6, 2e6]
    assert list(runs.table["loss"]) == [3.1, 2.9]
    assert any("n_params is column 'params'; also there: 'n_params_total'" in note for note in runs.notes)
    assert any("loss is column 'loss'; also there: 'val_loss'" in note for note in runs.notes)


def test_a_text_column_of_a_usual_name_gives_way(tmp_path: Path) -> None:
    runs = load_runs(_csv(tmp_path, "params,n,d,loss\nkaplan,1e6,2e7,3.1\nkaplan,2e6,4e7,2.9\n"))
    assert list(runs.table["n_params"]) == [1e6, 2e6]


def test_columns_that_some_laws_need_are_carried(tmp_path: Path) -> None:
    header = "id,N,D,loss,d_model,n_layers,seed,lr,bs,seq_len,unique_tokens,num_experts,n_active,bits,trunk_id\n"
    row = "a,1e6,2e7,3.1,64,4,0,1e-3,8,128,1e7,8,5e5,16,t\n"
    table = load_runs(_csv(tmp_path, header + row + row.replace("a,1e6", "b,2e6"))).table
    assert {k: table[k][0] for k in ("width", "depth", "seed", "peak_lr", "batch_tokens", "unique_tokens")} == {
        "width": 64, "depth": 4, "seed": 0, "peak_lr": 1e-3, "batch_tokens": 1024, "unique_tokens": 1e7
    }  # fmt: skip
    assert {k: table[k][0] for k in ("experts", "active_params", "weight_bits", "trunk")} == {
        "experts": 8, "active_params": 5e5, "weight_bits": 16, "trunk": "t"
    }  # fmt: skip


def test_an_incomplete_optional_column_is_left_out_or_refused_if_asked_for(tmp_path: Path) -> None:
    path = _csv(tmp_path, "N,D,loss,lr\n1e6,2e7,3.1,1e-3\n2e6,4e7,2.9,\n")
    runs = load_runs(path)
    assert "peak_lr" not in runs.table
    assert any("column 'lr' is left out: row 3" in note for note in runs.notes)
    with pytest.raises(InputError, match="row 3, column 'lr'"):
        load_runs(path, {"peak_lr": "lr"})


def test_exact_copies_are_dropped_once_and_seeds_kept(tmp_path: Path) -> None:
    runs = load_runs(_csv(tmp_path, HEADER + GOOD + "1e6,2e7,3.1\n1e6,2e7,3.15\n"))
    assert list(runs.table["loss"]) == [3.1, 2.9, 3.15]
    assert "left out 1 exact copy: row 4" in runs.notes


def test_a_column_that_is_no_status_is_said_in_few_words(tmp_path: Path) -> None:
    rows = "".join(f"{k}e6,2e7,3.{k},{k}\n" for k in range(1, 10))
    with pytest.raises(InputError, match="left out 4 runs more by column 'state': is it a status") as refused:
        load_runs(_csv(tmp_path, "N,D,loss,state\n" + rows))
    assert len(str(refused.value)) < 400


def test_two_losses_of_one_run_are_refused(tmp_path: Path) -> None:
    rows = "a,1e6,2e7,3.1\nb,2e6,4e7,2.9\na,1e6,2e7,3.3\n"
    with pytest.raises(InputError, match=r"rows 2, 4 share run_id 'a', N and D but have losses 3\.1, 3\.3"):
        load_runs(_csv(tmp_path, "run_id,N,D,loss\n" + rows))
    seeds = [f"{row},{seed}" for row, seed in zip(rows.split(), (0, 0, 1), strict=True)]
    assert len(load_runs(_csv(tmp_path, "name,N,D,loss,seed\n" + "\n".join(seeds)))) == 3


def test_checkpoints_of_one_run(tmp_path: Path) -> None:
    rows = "a,1e6,2e7,3.1,10\na,1e6,1e7,3.4,5\nb,2e6,4e7,2.9,10\n"
    curve = _csv(tmp_path, "run_id,N,D,loss,step\n" + rows)
    last = load_runs(curve)
    assert list(last.table["loss"]) == [3.1, 2.9]
    assert any("2 runs with 3 rows" in note for note in last.notes)
    every = load_runs(curve, checkpoints="all").table
    assert list(every["trunk"]) == ["a", "a", "b"]
    assert list(every["run_id"]) == ["a row 2", "a row 3", "b"]
    without_steps = "\n".join(row.rsplit(",", 1)[0] for row in rows.split())
    unordered = _csv(tmp_path, "run_id,N,D,loss\n" + without_steps)
    with pytest.raises(InputError, match="rows 2, 3 share run_id 'a' but are different runs or checkpoints"):
        load_runs(unordered)
    assert list(load_runs(unordered, checkpoints="last").table["loss"]) == [3.1, 2.9]
    models = load_runs(_csv(tmp_path, "name,N,D,loss\n" + without_steps))
    assert (len(models), models.table["run_id"].nunique()) == (3, 3)
    with pytest.raises(InputError, match="unknown choice of checkpoints 'first'"):
        load_runs(unordered, checkpoints="first")  # type: ignore[arg-type]


def test_row_numbers_are_an_editors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="row 6, column 'loss'"):
        load_runs(_csv(tmp_path, "\n" + HEADER + "1e6,2e7,3.1\n\n,,\n2e6,4e7,x\n"))
    path = tmp_path / "runs.jsonl"
    path.write_text('{"N": 1e6, "D": 2e7, "loss": 3}\n\n{"N": 1e6, "D": 2e7, "loss": null}\n')
    with pytest.raises(InputError, match="row 3, column 'loss'"):
        load_runs(path)
    path.write_text('{"N": 1e6, "D": 2e7, "loss": 3}\n[1]\n')
    with pytest.raises(InputError, match="line 2 is not an object"):
        load_runs(path)


def test_nulls_of_a_parquet_never_become_numbers(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "runs.parquet"
    frame = pd.DataFrame({"N": pd.array([10**6, None], "Int64"), "D": [2e7, 4e7], "loss": [3.1, 2.9]})
    frame.to_parquet(path)
    with pytest.raises(InputError, match="row 2, column 'N': nan"):
        load_runs(path)
    frame.assign(N=[True, True]).to_parquet(path)
    with pytest.raises(InputError, match="row 1, column 'N': True"):
        load_runs(path)
    frame.assign(N=pd.Timestamp("2026-01-01")).to_parquet(path)
    with pytest.raises(InputError, match="row 1, column 'N': Timestamp"):
        load_runs(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("N,D,loss,loss\n1e6,2e7,3,4\n", "two columns are named 'loss'"),
        ("N,D,loss\n1e6,2e7,3,9\n2e6,4e7,3,9\n", "more fields than the header"),
        ("N,D,loss\n1e6,2e7,3\n2e6,4e7,3,9\n", "cannot read .*line 2"),
        ('N,D,loss\n1e6,2e7,"3\n', "cannot read"),
    ],
)
def test_rows_are_never_shifted(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_runs(_csv(tmp_path, text))


def test_one_column_cannot_be_two_things(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="column 'x' is mapped to n_params and n_tokens"):
        load_runs(_csv(tmp_path, "x,y\n1e6,3\n"), {"n_params": "x", "n_tokens": "x", "loss": "y"})


def test_a_sweep_under_every_convention(make_sweep: Callable[..., Path]) -> None:
    sweep = make_sweep()
    found = {(r.convention["params"], r.convention["flops"]): r for r in conventions(sweep)}
    assert len(found) == 9
    spec = found["total", "exact"].plan.runs[0]  # type: ignore[union-attr]
    table = found["non_embedding", "6nd"].table
    assert table["flops"][0] == 6 * spec.params.non_embedding * spec.tokens
    attention = found["body_head", "full_attention"].table["flops"]
    assert (attention > found["body_head", "exact"].table["flops"]).all()
    assert len({tuple(r.table["loss"]) for r in found.values()}) == 1
    write_runs_csv(SweepDir(sweep))
    from_csv = {(r.convention["params"], r.convention["flops"]): r for r in conventions(sweep / "runs.csv")}
    assert from_csv.keys() == found.keys()
    for pair, runs in from_csv.items():
        assert runs.table["flops"].to_numpy() == pytest.approx(found[pair].table["flops"].to_numpy())
        assert runs.table["n_params"].to_numpy() == pytest.approx(found[pair].table["n_params"].to_numpy())


def test_repeated_data_of_a_sweep_gives_its_unique_tokens(make_sweep: Callable[..., Path]) -> None:
    sweep = make_sweep()
    assert "unique_tokens" not in load_runs(sweep).table
    first = load_runs(sweep).table["run_id"][0]
    record = json.loads((sweep / "runs" / first / "record.json").read_text())
    (sweep / "runs" / first / "record.json").write_text(json.dumps({**record, "epochs": 4.0}))
    table = load_runs(sweep).table
    assert table["unique_tokens"][0] == table["n_tokens"][0] / 4
    assert (table["unique_tokens"][1:] == table["n_tokens"][1:]).all()


def test_n_without_embeddings_from_vocabulary_and_width(tmp_path: Path) -> None:
    path = _csv(tmp_path, "params,width,tokens,loss\n2e6,64,4e7,3.1\n4e6,128,8e7,2.9\n")
    runs = load_runs(path, convention="non_embedding", vocab_size=1000)
    assert list(runs.table["n_params"]) == [2e6 - 64e3, 4e6 - 128e3]
    assert runs.convention == {"params": "non_embedding", "flops": "6nd", "loss": "as_given"}
    assert [r.convention["params"] for r in conventions(path, vocab_size=1000)] == ["as_given", "non_embedding"]
    with pytest.raises(InputError, match="row 2: N − vocab_size · width is not positive"):
        load_runs(path, convention="non_embedding", vocab_size=50304)
    as_given = load_runs(path, convention="non_embedding")
    assert as_given.convention["params"] == "as_given"
    assert any("convention=non_embedding is not in the file" in note for note in as_given.notes)


def test_joined_sources(tmp_path: Path) -> None:
    one = load_runs(_csv(tmp_path, "run_id,N,D,loss,seed\na,1e6,2e7,3.1,0\n"))
    (tmp_path / "b").mkdir()
    two = load_runs(_csv(tmp_path / "b", "run_id,N,D,loss\nb,2e6,4e7,2.9\n"))
    both = join_runs([one, two])
    assert list(both.table["run_id"]) == ["a", "b"]
    assert "seed" not in both.table
    assert any("left out seed" in note for note in both.notes)
    with pytest.raises(InputError, match="run 'a' is in two of"):
        join_runs([one, one])


def test_published_files_are_read_by_their_own_headers(golden: Path) -> None:
    epoch = load_runs(golden / "epoch_svg" / "points.csv")
    assert (len(epoch), epoch.notes) == (245, ("n_tokens from C = 6·N·D",))
    assert len(load_runs(golden / "llama_3" / "points.csv")) == 266
    porian = load_runs(golden / "porian_isoflop" / "points.csv")
    assert porian.table["n_params"].max() > 1e8
    assert len(load_runs(golden / "gemstones" / "cool_end.jsonl", checkpoints="all")) == 199
    steps = load_runs(golden / "steplaw" / "dense_lr_bs_loss.csv", {"loss": "smooth loss"}).table
    assert {"peak_lr", "batch_size", "width", "depth"} <= set(steps.columns)
    with pytest.raises(InputError, match=r"share run '190M', N and D .* keep one metric"):
        load_runs(golden / "olmo_ladder" / "points.csv", {"loss": "value"})


def test_a_million_rows(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(6, 9, 10**6), 10 ** rng.uniform(9, 11, 10**6)
    path = tmp_path / "runs.parquet"
    pd.DataFrame({"N": n, "D": d, "C": 6 * n * d, "loss": 1.8 + 400 * n**-0.34}).to_parquet(path)
    runs = load_runs(path)
    assert len(runs) == 10**6
    assert runs.table.memory_usage(deep=True).sum() < 3e8
