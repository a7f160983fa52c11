"""conf/ and a command line to one configuration: Hydra's groups and grammar, without its own error pages.

Hydra composes the groups (`data=stdlib`); single values (`model.width=64`) are set on the result afterwards, which
takes a millisecond where a composition takes fifty: a grid composes once per choice of groups.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from scaling.errors import InputError, unknown

CONF = Path(__file__).resolve().parents[1] / "conf"


@cache
def groups() -> dict[str, list[str]]:
    """The config groups and their options."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir()
    }


@cache
def parse_override(text: str) -> Override:
    """Read one `key=value`.

    Raises:
        InputError: not of that form.
    """
    if text.startswith("-"):
        name = text.lstrip("-").replace("-", "_").partition("=")[0]
        raise InputError(f"unknown option {text!r}: settings are written {name}=VALUE; --help shows them")
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        why = str(error).splitlines()[0]
        raise InputError(f"cannot read {text!r} as key=value ({why}): quote values with special characters") from None
    if override.is_delete():
        raise InputError(f"cannot delete a setting ({text!r}): give key=null to unset it")
    return override


def _is_group(override: Override) -> bool:
    return override.key_or_group in groups()


def expand(texts: Iterable[str]) -> list[list[str]]:
    """The product of overrides whose values may be lists (`a,b,c`, `range(…)`): one list of single overrides each."""
    product: list[list[str]] = [[]]
    for text in texts:
        override = parse_override(text)
        key = override.key_or_group
        if override.is_sweep_override():
            choices = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            choices = [text]
        product = [[*chosen, choice] for chosen in product for choice in choices]
    return product


def keys(node: Mapping[str, Any]) -> list[str]:
    """Every dotted key of a configuration that holds a value."""
    out = []
    for key, value in node.items():
        out += [f"{key}.{k}" for k in keys(value)] if isinstance(value, dict) and value else [key]
    return out


def update(config: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `config` with single values set; groups are left to `load`.

    Raises:
        InputError: a key that the configuration does not have.
    """
    out = copy.deepcopy(dict(config))
    for text in overrides:
        override = parse_override(text)
        if _is_group(override):
            continue
        *folders, last = override.key_or_group.split(".")
        node: Any = out
        for folder in folders:
            node = node.get(folder) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise _unknown_key(out, override.key_or_group)
        value = override.value()
        node[last] = node[last] | value if isinstance(value, dict) and isinstance(node[last], dict) else value
    return out


def _unknown_key(config: Mapping[str, Any], key: str) -> InputError:
    """Suggests the nearest of all settings; lists those beside it, or the top level where there is no such group."""
    every = keys(config)
    leaves: dict[str, list[str]] = {}
    for name in every:
        leaves.setdefault(name.rpartition(".")[2], []).append(name)
    near = difflib.get_close_matches(key, every, n=1, cutoff=0.6)
    near = near or [full for leaf in difflib.get_close_matches(key, leaves, n=1) for full in leaves[leaf]]
    head = key.partition(".")[0]
    beside = [name for name in every if name.startswith(f"{head}.")] or list(config)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return InputError(f"unknown override {key!r}: {hint}valid: {', '.join(sorted(beside))}; --help lists all")


def load(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration `conf/NAME.yaml` with overrides on it; later ones win. A grid may be a file of its own, grid=PATH.yaml.

    Raises:
        InputError: unknown group option or key, an override or a grid's file that cannot be read.
    """
    choices: dict[str, str] = {}
    grid: dict[str, Any] = {}
    for text in overrides:
        override = parse_override(text)
        if _is_group(override):
            group, value = override.key_or_group, override.value()
            if group == "grid" and str(value).endswith(".yaml"):
                grid = {"grid": read_grid_file(Path(str(value)))}
                continue
            if value not in groups()[group]:
                raise unknown(group, value, groups()[group])
            choices[group] = str(value)
    return update(_compose(name, tuple(sorted(choices.items()))) | grid, overrides)


def read_grid_file(file: Path) -> dict[str, Any]:
    """A grid's YAML outside conf/grid, as python -m analysis.design writes it.

    Raises:
        InputError: it cannot be read, or is no mapping.
    """
    if not file.is_file():
        raise InputError(f"no grid file {file}: python -m analysis.design SWEEP --out GRID.yaml writes one")
    try:
        data = OmegaConf.to_container(OmegaConf.load(file))
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{file} is not a grid: {error}") from None
    if not isinstance(data, dict):
        raise InputError(
            f"{file} is not a grid file: it needs points, as conf/grid/demo.yaml has them (a round's file: delete it, and it is chosen again)"
        )
    return {str(key): value for key, value in data.items()}


@cache
def _compose(name: str, choices: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    defaults = OmegaConf.load(CONF / f"{name}.yaml").defaults
    listed = {key for entry in defaults if isinstance(entry, DictConfig) for key in entry}
    chosen = [f"{'' if group in listed else '+'}{group}={choice}" for group, choice in choices]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = OmegaConf.to_container(compose(name, chosen), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"conf/{name}.yaml does not compose: {error}") from None
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}
