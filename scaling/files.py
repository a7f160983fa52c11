"""Files that are never half-written: everything that a crash must not spoil goes through here."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from scaling.errors import InputError


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file by temporary name, fsync and replace: readers see the old content or the new, nothing between.

    Args:
        path: the destination; its folder is made.
        write: called with the temporary file, opened in binary mode. What it raises (disk full) leaves `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(fd, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Atomic text file, UTF-8."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, data: Any) -> None:
    """Atomic, indented JSON file; NaN and infinity refused."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_json_once(path: Path, data: Any) -> bool:
    """Write a JSON file that the first writer wins (by hard link). Returns whether this call made it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    write_json(temporary, data)
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        temporary.unlink()


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file; `what` names it in messages.

    Raises:
        InputError: missing, unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no {what} at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {what} {path}: {error}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{what} {path} is not JSON: {error}") from None


def read_versioned(path: Path, what: str, version: int) -> dict[str, Any]:
    """Parse a JSON object with a `schema_version` that this code knows (≤ version), and drop that key.

    Raises:
        InputError: as `read_json`, or written by a newer schema, or no schema_version.
    """
    data = read_json(path, what)
    found = data.pop("schema_version", None) if isinstance(data, dict) else None
    if not isinstance(found, int):
        raise InputError(f"{what} {path} has no schema_version: it is not one of isoflop's files")
    if found > version:
        raise InputError(
            f"{what} {path} was written by a newer isoflop (schema {found}; this one reads up to {version}): update isoflop"
        )
    result: dict[str, Any] = data
    return result


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a last line cut short by a crash is left out. Missing file: no rows."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for line in lines[:-1]:  # what follows the last newline is empty or was cut short
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a line torn by a crash in the middle of an append
    return rows
