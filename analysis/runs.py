"""A sweep directory or any CSV, Parquet or JSON-lines file → one tidy table of runs with its counting convention.

pandas is imported when a table is made, not when this module is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scaling.accounting import PARAMS_CONVENTIONS
from scaling.errors import InputError, unknown
from scaling.records import Plan, RunRecord
from scaling.sweepdir import SweepDir

if TYPE_CHECKING:
    import pandas as pd

REQUIRED = ("n_params", "n_tokens", "flops", "loss")
_OPTIONAL = ("run_id", "status", "seed", "width", "depth", "peak_lr", "batch_tokens")
_ALIASES: dict[str, tuple[str, ...]] = {
    "n_params": ("n_params", "n_params_body_head", "n", "params", "parameters", "model_size", "param_count", "num_params",
                 "n_params_total", "non_embedding_params", "n_params_non_embedding", "params_active_precise"),
    "n_tokens": ("n_tokens", "d", "tokens", "training_tokens", "train_tokens", "num_tokens", "dataset_size"),
    "flops": ("flops", "flops_exact", "c", "compute", "training_flop", "training_flops", "train_flops", "budget", "flop",
              "flops_6nd"),
    "loss": ("loss", "final_loss", "val_loss", "validation_loss", "eval_loss", "test_loss", "smooth_loss", "l"),
    "run_id": ("run_id", "run", "run_name", "id", "name"),
    "status": ("status",),
    "seed": ("seed",),
    "width": ("width", "d_model", "hidden_size"),
    "depth": ("depth", "n_layers", "num_layers"),
    "peak_lr": ("peak_lr", "lr", "learning_rate"),
    "batch_tokens": ("batch_tokens",),
}  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """Finished runs, one row each."""

    table: pd.DataFrame
    """Columns run_id, n_params, n_tokens, flops, loss, and seed, width, depth, status, peak_lr, batch_tokens where known."""
    source: str
    """Where they came from, as given."""
    convention: dict[str, str]
    """params (total | non_embedding | body_head | as_given), flops (exact | 6nd | as_given), loss (nats_per_token | as_given)."""
    notes: tuple[str, ...] = ()
    """What was left out or derived."""
    plan: Plan | None = field(default=None, repr=False)
    """The sweep's plan, when the source is a sweep directory."""

    def __len__(self) -> int:
        return len(self.table)


def load_runs(path: Path | str, columns: Mapping[str, str] | None = None, convention: str = "body_head") -> Runs:
    """Read runs.

    Args:
        path: a sweep directory (plan.json with run records, or with runs.csv alone), or a .csv, .parquet or .jsonl file.
        columns: canonical name (n_params, n_tokens, flops, loss, …) → column of the file, where names are not usual ones.
            Any two of n_params, n_tokens, flops are enough: C = 6·N·D gives the third.
        convention: which N a sweep's runs are counted with: total | non_embedding | body_head.
    Raises:
        InputError: nothing there; a needed column missing; a value that is not a positive number (names row and column);
            a sweep written by a newer schema; no usable run.
    """
    path = Path(path)
    if path.is_dir():
        return _load_sweep(path, convention, columns)
    if not path.exists():
        raise InputError(f"no runs at {path}: give a sweep directory or a .csv, .parquet or .jsonl file")
    frame = _read_file(path)
    params = convention if f"n_params_{convention}" in frame.columns else "as_given"
    return _tidy(
        frame, str(path), columns or {}, {"params": params, "flops": "as_given", "loss": "as_given"}, convention
    )


def load_points(path: Path) -> list[tuple[float, float]]:
    """(N, D) of each row of a file with columns n_params and n_tokens.

    Raises:
        InputError: missing file or column, or a value that is not a positive number.
    """
    frame = _read_file(path) if path.exists() else None
    if frame is None:
        raise InputError(f"no points at {path}: give a CSV with columns n_params and n_tokens")
    names = _match_columns(list(map(str, frame.columns)), {}, "body_head")
    missing = [c for c in ("n_params", "n_tokens") if c not in names]
    if missing:
        raise InputError(f"{path}: no column {' or '.join(missing)}; there are {', '.join(map(str, frame.columns))}")
    rows = frame.index.to_series() + 2
    n, d = (_numbers(frame[names[c]], str(path), names[c], rows) for c in ("n_params", "n_tokens"))
    return [(float(a), float(b)) for a, b in zip(n, d, strict=True)]


def _load_sweep(path: Path, convention: str, columns: Mapping[str, str] | None) -> Runs:
    import pandas as pd

    if convention not in PARAMS_CONVENTIONS:
        raise unknown("parameter convention", convention, PARAMS_CONVENTIONS)
    sweep = SweepDir(path)
    if not sweep.plan_json.exists():
        raise InputError(f"{path} is not a sweep directory: it has no plan.json")
    plan = sweep.plan()
    records = sweep.records() if sweep.runs.is_dir() else []
    if records:
        frame = pd.DataFrame([_row(record) for record in records])
        frame["n_params"] = frame[f"n_params_{convention}"]
    elif sweep.runs_csv.exists():
        frame = _read_file(sweep.runs_csv)
        planned = {spec.run_id for spec in plan.runs}
        if "run_id" in frame.columns:
            frame = frame[frame["run_id"].astype(str).isin(planned)]
        frame["n_params"] = frame.get(f"n_params_{convention}")
    else:
        raise InputError(f"sweep {path} has no finished run yet: python -m scaling.status {path} shows where it is")
    counted = {"params": convention, "flops": "exact", "loss": "nats_per_token"}
    runs = _tidy(frame, str(path), {"n_params": "n_params", **(columns or {})}, counted, convention, plan)
    unfinished = len(plan.runs) - len(frame)
    notes = runs.notes + (
        (f"{unfinished} of {len(plan.runs)} planned runs are not finished",) if unfinished > 0 else ()
    )
    return Runs(runs.table, runs.source, runs.convention, notes, plan)


def _row(record: RunRecord) -> dict[str, Any]:
    spec = record.spec
    return {
        "run_id": record.run_id,
        "status": record.status,
        **{f"n_params_{c}": record.params[c] for c in PARAMS_CONVENTIONS},
        "n_tokens": record.tokens,
        "flops": record.flops["exact"],
        "loss": record.loss,
        "seed": spec.seed,
        "width": spec.shape.width,
        "depth": spec.shape.depth,
        "peak_lr": spec.optim.peak_lr,
        "batch_tokens": spec.batch_tokens,
    }


def _read_file(path: Path) -> pd.DataFrame:
    import pandas as pd

    readers = {
        ".csv": lambda: pd.read_csv(path),
        ".parquet": lambda: pd.read_parquet(path),
        ".jsonl": lambda: pd.read_json(path, lines=True),
    }
    if path.suffix.lower() not in readers:
        raise InputError(f"cannot tell what {path} is: expected a sweep directory or one of {', '.join(readers)}")
    try:
        frame = readers[path.suffix.lower()]()
    except pd.errors.EmptyDataError:
        raise InputError(f"{path} is empty: expected a header and one row a run") from None
    except ImportError:
        raise InputError("reading Parquet needs pyarrow: pip install pyarrow, or convert the file to CSV") from None
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if frame.empty:
        raise InputError(f"{path} has no rows: expected one row a run")
    return frame


def _tidy(
    frame: pd.DataFrame,
    source: str,
    columns: Mapping[str, str],
    counted: dict[str, str],
    convention: str,
    plan: Plan | None = None,
) -> Runs:
    import pandas as pd

    names = _match_columns(list(map(str, frame.columns)), columns, convention)
    if "loss" not in names or len([c for c in REQUIRED[:3] if c in names]) < 2:
        missing = [c for c in REQUIRED if c not in names]
        raise InputError(
            f"{source}: no column for {', '.join(missing)}; needed are loss and two of n_params, n_tokens, flops. "
            f"Columns there: {', '.join(map(str, frame.columns))}. Name them: --columns n_params=COL,n_tokens=COL,loss=COL"
        )
    notes: list[str] = []
    rows = pd.Series(range(2, len(frame) + 2))  # as an editor numbers a file with a header
    frame = frame.reset_index(drop=True)
    if "status" in names:
        status = frame[names["status"]].astype(str)
        bad = ~status.isin(["ok", "done", "finished", "success"])
        for name, count in status[bad].value_counts().items():
            notes.append(f"left out {count} {name} run{'s' if count > 1 else ''}")
        frame, rows = frame[~bad].reset_index(drop=True), rows[~bad].reset_index(drop=True)
    if frame.empty:
        raise InputError(f"{source}: no run is usable ({'; '.join(notes) or 'no rows'})")
    out = pd.DataFrame(index=frame.index)
    for canonical in (*_OPTIONAL, *REQUIRED):
        if canonical in names:
            column = frame[names[canonical]]
            out[canonical] = _numbers(column, source, names[canonical], rows) if canonical in REQUIRED else column
    if "run_id" not in out:
        out["run_id"] = [f"row {r}" for r in rows]
    out["run_id"] = out["run_id"].astype(str)
    notes += _third_column(out, names)
    if "status" not in out:
        out["status"] = "ok"
    if "flops" not in names:
        counted = {**counted, "flops": "6nd"}
    return Runs(out, source, counted, tuple(notes), plan)


def _match_columns(present: Sequence[str], columns: Mapping[str, str], convention: str) -> dict[str, str]:
    """Canonical name → the file's column: as mapped, else the first usual name that is there."""
    for canonical, column in columns.items():
        if canonical not in _ALIASES:
            raise unknown("column to map", canonical, _ALIASES)
        if column not in present:
            raise unknown(f"column (for {canonical})", column, present)
    normal = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): name for name in reversed(present)}
    names = dict(columns)
    for canonical, aliases in _ALIASES.items():
        if canonical == "n_params":
            aliases = ("n_params", f"n_params_{convention}", *aliases)
        found = next((normal[a] for a in aliases if a in normal and normal[a] not in names.values()), None)
        if canonical not in names and found is not None:
            names[canonical] = found
    return names


def _numbers(column: pd.Series, source: str, name: str, rows: pd.Series) -> np.ndarray:
    """The column as positive finite floats; the first that is not is named."""
    import pandas as pd

    values = pd.to_numeric(column, errors="coerce").to_numpy(float, na_value=np.nan)
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(bad):
        i = int(bad[0])
        more = f" ({len(bad)} such rows)" if len(bad) > 1 else ""
        raise InputError(
            f"{source}: row {rows.iloc[i]}, column {name!r}: {_shown(column.iloc[i])} is not a positive number{more}; "
            "correct or remove it"
        )
    return values


def _third_column(out: pd.DataFrame, names: Mapping[str, str]) -> list[str]:
    """Fill in the one of N, D, C that is missing, by C = 6·N·D. Returns what to note."""
    if "flops" not in names:
        out["flops"] = 6.0 * out["n_params"] * out["n_tokens"]
    elif "n_tokens" not in names:
        out["n_tokens"] = out["flops"] / (6.0 * out["n_params"])
    elif "n_params" not in names:
        out["n_params"] = out["flops"] / (6.0 * out["n_tokens"])
    missing = [c for c in REQUIRED[:3] if c not in names]
    return [f"{missing[0]} from C = 6·N·D"] if missing else []


def _shown(value: Any) -> str:
    return repr(value.item() if isinstance(value, np.generic) else value)
