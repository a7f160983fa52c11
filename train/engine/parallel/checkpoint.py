"""Checkpoints of a run on several ranks: each writes its parts (torch DCP), checksums last; any layout reads them.

`step-NNNNNNNNN.pt` is then a folder: DCP's files, `scalars.pt` with the rest of the state, and `valid.json` with every
file's size and sha256. It is written under another name and renamed when `valid.json` is there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor

from scaling.errors import InputError
from scaling.files import write_atomic, write_json
from scaling.spec import RunSpec
from train.engine.optim import named_states
from train.engine.parallel.mesh import Mesh
from train.engine.parallel.shards import local_part, own_part
from train.engine.parallel.world import World
from train.model.decoder import Decoder

VALID = "valid.json"
SCALARS = "scalars.pt"
MODEL = "model"


def save(path: Path, state: dict[str, Any], world: World) -> None:
    """Write a checkpoint folder; every rank calls it.

    Args:
        path: the folder; replaced if it is there.
        state: Trainer.state_dict() of a sharded run: "model" and "optimizers" hold sharded tensors by name.
    Raises:
        OSError: disk full, on every rank; nothing was written then.
    """
    folder = Path(world.share(f"{path.parent}/.{path.name}.{os.getpid()}.tmp"))
    if world.leads:
        folder.mkdir(parents=True)
    world.share(None)
    tensors = {f"{MODEL}/{name}": tensor for name, tensor in state["model"].items()} | state["optimizers"]["named"]
    rest = {key: value for key, value in state.items() if key not in ("model", "optimizers")}
    is_full = False
    try:
        dcp.save(tensors, checkpoint_id=folder, process_group=world.group)
        if world.leads:
            scalars = {**rest, "steps": state["optimizers"]["steps"]}
            write_atomic(folder / SCALARS, lambda file: torch.save(scalars, file))
    except (CheckpointException, OSError) as error:
        causes = [error, *(e for e, _ in getattr(error, "failures", {}).values())]
        if not any(getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
            raise
        is_full = True
    if world.agree(is_full)[0]:
        if world.leads:
            shutil.rmtree(folder, ignore_errors=True)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    own = list(folder.glob(f"__{world.rank}_*"))
    if world.leads:
        own += [folder / SCALARS, folder / ".metadata"]
    sums = {name: entry for part in world.collect({f.name: _digest(f) for f in own}) for name, entry in part.items()}
    if world.leads:
        write_json(folder / VALID, {"files": sums})
        if path.is_dir():  # a run that was rolled back, or two attempts that overlapped
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        folder.rename(path)
    world.share(None)


def load(paths: Sequence[Path], state: dict[str, Any], spec: RunSpec, mesh: Mesh) -> dict[str, Any] | None:
    """Fill a sharded state from the first of these checkpoints that is whole; every rank calls it.

    Args:
        paths: folders, or files of one process; rank 0's list counts.
        state: as `save` takes it; its tensors are filled in place.
    Returns:
        The rest of the state ("run_id", "step", "progress", "rng", "steps"), or None: no checkpoint is whole.
    Raises:
        InputError: it is of neither this run nor its trunk, so of other tensors perhaps.
    """
    world = mesh.world
    tensors = {f"{MODEL}/{name}": tensor for name, tensor in state["model"].items()} | state["optimizers"]["named"]
    for path in world.share(list(paths)):
        if not path.is_dir():
            scalars, fault = _load_file(path, tensors, spec, mesh)
        else:
            scalars, fault = None, fault_of(path, world)
            if fault is None:
                scalars = torch.load(path / SCALARS, map_location="cpu", weights_only=True)
                _check_run(scalars, spec)
                dcp.load(tensors, checkpoint_id=path)
        if scalars is not None:
            return scalars
        if world.leads:
            print(f"checkpoint {path.name} is damaged ({fault}): trying the one before", file=sys.stderr)
    return None


def _check_run(state: dict[str, Any], spec: RunSpec) -> None:
    if state["run_id"] not in (spec.run_id, spec.parent_run_id):
        raise InputError(f"checkpoint of run {state['run_id']} in the folder of run {spec.run_id}: delete it")


def _load_file(
    path: Path, tensors: dict[str, Tensor], spec: RunSpec, mesh: Mesh
) -> tuple[dict[str, Any] | None, str | None]:
    """A checkpoint of one process, of which each rank takes its parts: the rest of the state, or what is wrong."""
    try:
        whole: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        fault = None
    except Exception as error:  # torch.load's errors for a spoilt file have no common type
        fault = repr(error)
    fault = next((f for f in mesh.world.collect(fault) if f), None)
    if fault is not None:
        return None, fault
    _check_run(whole, spec)
    with torch.device("meta"):
        decoder = Decoder(spec.shape, spec.precision)
    named, steps = named_states(whole["optimizers"], decoder, spec.optim)
    full = {f"{MODEL}/{name}": tensor for name, tensor in whole["model"].items()} | named
    with torch.no_grad():
        for key, tensor in tensors.items():
            is_cut = isinstance(tensor, DTensor)
            local_part(tensor).copy_(own_part(key.partition("/")[2], full[key], mesh) if is_cut else full[key])
    return {
        **{key: value for key, value in whole.items() if key not in ("model", "optimizers")},
        "steps": steps,
    }, None


def read_whole(path: Path) -> dict[str, Any]:
    """A checkpoint folder as one process reads it: whole tensors, "optimizers" by name.

    Raises:
        ValueError: damaged; the message says what.
    """
    fault = fault_of(path)
    if fault is not None:
        raise ValueError(fault)
    sizes = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {key: torch.empty(meta.size) for key, meta in sizes.items()}  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    state: dict[str, Any] = torch.load(path / SCALARS, map_location="cpu", weights_only=True)
    model = {key.partition("/")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{MODEL}/")}
    if "lm_head.weight" not in model:  # tied: one tensor with two names
        model["lm_head.weight"] = model["model.embed_tokens.weight"]
    named = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{MODEL}/")}
    return {"model": model, "optimizers": {"named": named, "steps": state.pop("steps")}, **state}


def fault_of(path: Path, world: World | None = None) -> str | None:
    """What is wrong with a checkpoint folder, by its checksums, or None. The ranks share the reading."""
    try:
        wanted = json.loads((path / VALID).read_text())["files"]
    except (OSError, ValueError, KeyError):
        wanted, found = {}, f"no {VALID} that can be read"
    else:
        rank, size = (0, 1) if world is None else (world.rank, world.size)
        own = sorted(wanted)[rank::size]
        found = next((f"{name} is not what was written" for name in own if _digest(path / name) != wanted[name]), "")
    faults = [found] if world is None else world.collect(found)
    return next((fault for fault in faults if fault), None)


def _digest(path: Path) -> dict[str, Any] | None:
    try:
        with open(path, "rb") as file:
            return {
                "bytes": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    except OSError:
        return None
