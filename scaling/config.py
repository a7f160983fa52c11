"""Plain dictionaries (from YAML, JSON or Hydra) to frozen dataclasses and back, strictly.

Every schema of the project is a frozen dataclass. `from_dict` refuses unknown keys, missing keys and wrong
types, naming the place; `to_dict` is its inverse; `canonical_json` is the one text that hashes are taken of.
Field metadata that this module reads:
    identity=False   the field does not decide a run's result and is left out of `identity_dict`
    absent=VALUE     a field added after version 1: left out of what is written, hashed and sealed while it equals VALUE
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from scaling.errors import InputError, unknown

T = TypeVar("T")


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build the frozen dataclass `cls` from a mapping; nested dataclasses, tuples, Optional and Literal included.

    Args:
        cls: a dataclass type.
        data: its fields by name. Fields with a default may be missing.
        where: dotted place of `data` in the whole, for messages.
    Raises:
        InputError: unknown or missing key, or a value of the wrong type; also what `cls.__post_init__` raises.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{where or cls.__name__}: expected a mapping, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise unknown(f"key in {where or cls.__name__}", key, fields)
    missing = [
        n
        for n, f in fields.items()
        if n not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where or cls.__name__}: missing {', '.join(missing)}")
    hints = _hints(cls)  # type: ignore[arg-type]
    values = {k: _convert(hints[k], v, f"{where}.{k}" if where else k) for k, v in data.items()}
    return cls(**values)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in (o for o in options if o is not type(None)):
            try:
                return _convert(option, value, where)
            except InputError as error:
                errors.append(str(error))
        raise InputError(errors[0])
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise unknown(where, value, get_args(hint))
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{where}: expected a list, got {value!r}")
        args = get_args(hint)
        if origin is tuple and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise InputError(f"{where}: expected {len(args)} values, got {value!r}")
            return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
        return origin(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: expected a mapping, got {value!r}")
        item = get_args(hint)[1]
        return {str(k): _convert(item, v, f"{where}.{k}") for k, v in value.items()}
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint in (int, float) and isinstance(value, str):  # PyYAML reads 1e23 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    if hint is int and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value) and value == int(value):  # 1e6 is how people write a million tokens
            return int(value)
        raise InputError(f"{where}: expected a whole number, got {value!r}")
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    raise InputError(f"{where}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def to_dict(obj: Any) -> Any:
    """The inverse of `from_dict`: dataclasses to dictionaries, tuples to lists, all JSON-ready."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        present = (f for f in dataclasses.fields(obj) if f.init and not _is_absent(f, getattr(obj, f.name)))
        return {f.name: to_dict(getattr(obj, f.name)) for f in present}
    if isinstance(obj, Mapping):
        return {str(k): to_dict(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [to_dict(v) for v in obj]
    return obj


def _is_absent(field: dataclasses.Field[Any], value: Any) -> bool:
    return "absent" in field.metadata and bool(value == field.metadata["absent"])


def identity_dict(obj: Any) -> Any:
    """`to_dict` without the fields that do not decide a run's result (see the module's docstring)."""
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        out = {}
        for f in dataclasses.fields(obj):
            value = getattr(obj, f.name)
            if not f.metadata.get("identity", True) or _is_absent(f, value):
                continue
            out[f.name] = identity_dict(value)
        return out
    if isinstance(obj, (list, tuple)):
        return [identity_dict(v) for v in obj]
    return obj


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no white space; NaN and infinity refused. Equal data give equal text."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
