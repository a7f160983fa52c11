"""Whatever a file holds, reading it ends in runs with finite positive numbers or in an InputError: never anything else."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.runs import Runs, load_points, load_runs
from analysis.runs.columns import ALIASES, LOSS_UNITS, NUMBERS, REQUIRED, convert_loss
from scaling.errors import InputError

pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".jsonl.gz", ".csv.zst", ".jsonl.zst")
fuzz = settings(max_examples=60)

NAMES = st.sampled_from(sorted({a for aliases in ALIASES.values() for a in aliases})) | st.text(max_size=8)
NUMBER_TEXT = st.sampled_from(
    ["1e6", "2e8", "3.1", "0", "-1", "nan", "inf", "-inf", "1e400", "1e-400", "", " ", "null", "None", "True", "1,000",
     "7B", "9" * 400, "0x10", "1_000", "1e5", "5e-324", "1.7e308", "2026-01-01", "α", "\x00", '"', "[1]"]
)  # fmt: skip
CELLS = st.one_of(
    st.floats(),
    st.integers(),
    st.integers(10**18, 10**40),
    st.none(),
    st.booleans(),
    st.text(max_size=6),
    NUMBER_TEXT,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def read(path: Path, **asked: Any) -> Runs | None:
    """What `load_runs` makes of a file, checked; None where it refuses."""
    try:
        runs = load_runs(path, **asked)
    except InputError:
        return None
    table = runs.table
    assert len(table) > 0
    for name in REQUIRED:
        values = table[name].to_numpy(float)
        assert np.isfinite(values).all()
        assert (values > 0).all()
    for name in set(NUMBERS) & set(table.columns):
        assert np.isfinite(table[name].to_numpy(float)).all()
    assert table["run_id"].is_unique
    return runs


def valid_frame(seed: int, rows: int) -> pd.DataFrame:
    """Runs on a plain surface, with the columns that files usually have."""
    rng = np.random.default_rng(seed)
    n = np.round(10 ** rng.uniform(6, 9, rows))
    d = np.round(n * 10 ** rng.uniform(0.5, 2, rows))
    return pd.DataFrame(
        {
            "run_id": [f"r{i}" for i in range(rows)],
            "N": n,
            "D": d,
            "C": 6 * n * d,
            "loss": 1.8 + 400 * n**-0.34 + 2000 * d**-0.36,
            "seed": np.arange(rows),
            "lr": 10 ** rng.uniform(-4, -2, rows),
            "status": "ok",
        }
    )


def content(frame: pd.DataFrame, suffix: str) -> bytes:
    """The frame as a file of this kind."""
    if suffix == ".parquet":
        buffer = BytesIO()
        frame.to_parquet(buffer, index=False)
        return buffer.getvalue()
    if ".jsonl" in suffix:
        rows = (json.dumps(row) for row in frame.astype(object).where(frame.notna(), None).to_dict("records"))
        return pack("\n".join(rows).encode(), suffix)
    text = frame.to_csv(index=False, sep="\t" if suffix == ".tsv" else ",")
    return pack(text.encode("utf-8", "surrogatepass"), suffix)


def pack(raw: bytes, suffix: str) -> bytes:
    """Compressed as the suffix says."""
    if suffix.endswith(".gz"):
        return gzip.compress(raw, mtime=0)
    return zstandard.ZstdCompressor().compress(raw) if suffix.endswith(".zst") else raw


@fuzz
@given(raw=st.binary(max_size=300), suffix=st.sampled_from(SUFFIXES), packed=st.booleans())
def test_random_bytes(folder: Path, raw: bytes, suffix: str, packed: bool) -> None:
    path = folder / f"bytes{suffix}"
    path.write_bytes(pack(raw, suffix) if packed else raw)
    assert read(path) is None


@fuzz
@given(
    header=st.lists(NAMES, min_size=1, max_size=8),
    rows=st.lists(st.lists(NUMBER_TEXT, max_size=9), max_size=6),
    suffix=st.sampled_from((".csv", ".tsv")),
    ending=st.sampled_from(("\n", "\r\n", "\r")),
    mark=st.sampled_from(("", "\ufeff")),
)
def test_random_tables(
    folder: Path, header: list[str], rows: list[list[str]], suffix: str, ending: str, mark: str
) -> None:
    delimiter = "\t" if suffix == ".tsv" else ","
    text = mark + ending.join(delimiter.join(row) for row in (header, *rows))
    path = folder / f"table{suffix}"
    path.write_bytes(text.encode("utf-8", "replace"))
    read(path)
    try:
        points = load_points(path)
    except InputError:
        return
    assert all(math.isfinite(x) and x > 0 for point in points for x in point)


@fuzz
@given(rows=st.lists(st.dictionaries(NAMES, CELLS | st.lists(CELLS, max_size=2), max_size=8) | CELLS, max_size=5))
def test_random_json_lines(folder: Path, rows: list[Any]) -> None:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    read(path)


def _drop_column(frame: pd.DataFrame, column: str, cell: Any) -> pd.DataFrame:
    return frame.drop(columns=column)


def _set_cell(frame: pd.DataFrame, column: str, cell: Any) -> pd.DataFrame:
    values = frame[column].astype(object)
    values.iloc[len(values) // 2] = cell
    return frame.assign(**{column: values})


def _set_column(frame: pd.DataFrame, column: str, cell: Any) -> pd.DataFrame:
    return frame.assign(**{column: [cell] * len(frame)})


def _scale_column(frame: pd.DataFrame, column: str, cell: Any) -> pd.DataFrame:
    factor = cell if isinstance(cell, float) else 1e-9
    return frame.assign(**{column: pd.to_numeric(frame[column], errors="coerce") * factor})


def _rename(frame: pd.DataFrame, column: str, cell: Any) -> pd.DataFrame:
    return frame.rename(columns={column: str(cell)})


def _two_of_a_name(frame: pd.DataFrame, column: str, cell: Any) -> pd.DataFrame:
    return pd.concat([frame, frame[[column]]], axis=1)


def _repeat_rows(frame: pd.DataFrame, column: str, cell: Any) -> pd.DataFrame:
    return pd.concat([frame, frame.iloc[:2]], ignore_index=True)


def _swap(frame: pd.DataFrame, column: str, cell: Any) -> pd.DataFrame:
    return frame.rename(columns={column: "loss", "loss": column}) if column != "loss" else frame


MUTATIONS = (
    _drop_column, _set_cell, _set_column, _scale_column, _rename, _two_of_a_name, _repeat_rows, _swap
)  # fmt: skip


@settings(max_examples=250)
@given(data=st.data(), seed=st.integers(0, 99), rows=st.integers(1, 12), suffix=st.sampled_from(SUFFIXES))
def test_mutated_tables(folder: Path, data: st.DataObject, seed: int, rows: int, suffix: str) -> None:
    frame = valid_frame(seed, rows)
    for mutate in data.draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=3)):
        if frame.columns.is_unique and len(frame.columns):
            column = data.draw(st.sampled_from(list(frame.columns)))
            if "loss" in frame.columns:
                frame = mutate(frame, column, data.draw(CELLS))
    try:
        raw = content(frame, suffix)
    except Exception:  # what cannot be written (mixed types in Parquet, two keys in JSON) is not a file to read
        return
    path = folder / f"mutated{suffix}"
    path.write_bytes(raw)
    read(path)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 3),
    suffix=st.sampled_from(SUFFIXES),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(b"0123456789.,eE-\n") | st.integers(0, 255)),
        min_size=1,
        max_size=4,
    ),
    cut=st.just(1.0) | st.floats(0, 1),
)
def test_mutated_bytes(folder: Path, seed: int, suffix: str, edits: list[tuple[float, int]], cut: float) -> None:
    raw = bytearray(content(valid_frame(seed, 5), suffix))
    for place, byte in edits:
        raw[int(place * len(raw))] = byte
    path = folder / f"edited{suffix}"
    path.write_bytes(bytes(raw[: round(cut * len(raw))]))
    read(path)


@fuzz
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 30), suffix=st.sampled_from(SUFFIXES))
def test_what_is_written_is_read(folder: Path, seed: int, rows: int, suffix: str) -> None:
    frame = valid_frame(seed, rows)
    path = folder / f"whole{suffix}"
    path.write_bytes(content(frame, suffix))
    runs = read(path)
    assert runs is not None
    for column, canonical in {
        "N": "n_params",
        "D": "n_tokens",
        "C": "flops",
        "loss": "loss",
        "lr": "peak_lr",
    }.items():
        np.testing.assert_allclose(runs.table[canonical].to_numpy(float), frame[column].to_numpy(float), rtol=1e-12)
    assert list(runs.table["run_id"]) == list(frame["run_id"])


@fuzz
@given(
    seed=st.integers(0, 99),
    form=st.sampled_from((str.upper, str.title, lambda name: f" {name} ", lambda name: name.replace("_", " "))),
    canonical=st.sampled_from(("n_params", "n_tokens", "loss")),
    data=st.data(),
)
def test_usual_names_in_any_writing(
    folder: Path, seed: int, form: Callable[[str], str], canonical: str, data: st.DataObject
) -> None:
    column = {"n_params": "N", "n_tokens": "D", "loss": "loss"}[canonical]
    alias = data.draw(st.sampled_from(ALIASES[canonical]))
    frame = valid_frame(seed, 4)[["N", "D", "loss"]].rename(columns={column: form(alias)})
    path = folder / "named.csv"
    path.write_bytes(content(frame, ".csv"))
    runs = read(path)
    assert runs is not None
    np.testing.assert_allclose(runs.table[canonical], frame[form(alias)], rtol=1e-12)


@given(
    loss=st.floats(0.01, 20), source=st.sampled_from(LOSS_UNITS), target=st.sampled_from(LOSS_UNITS),
    tokens_per_byte=st.floats(0.05, 1),
)  # fmt: skip
def test_conversion_of_losses_round_trips(loss: float, source: str, target: str, tokens_per_byte: float) -> None:
    there = convert_loss(loss, source, target, tokens_per_byte)
    assert convert_loss(there, target, source, tokens_per_byte) == pytest.approx(loss)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"N": ' + "9" * 5000 + "}", '{"N": 1e6, "D": 2e7, "loss": 3'])
def test_json_that_breaks_a_parser(tmp_path: Path, text: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(text)
    assert read(path) is None
