"""Memory before and when it runs out: what recompute=budget chooses, what is refused, what the error says."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from scaling.layout import layout_values
from scaling.memory import (
    DoesNotFit,
    Room,
    Settings,
    check_fits,
    choose_recompute,
    describe_recompute,
    explain,
    host_room,
)
from scaling.spec import RunSpec
from train.data.tokenizer import EOS
from train.engine.host import Host
from train.model.attention import Packing
from train.model.precision import compute_dtype

if TYPE_CHECKING:
    from train.engine.parallel.world import World


def room(device: str) -> Room:
    """The memory that training on a device may use, and how much of it this process holds already."""
    kind = torch.device(device)
    if kind.type != "cuda":
        return host_room()
    free, total = torch.cuda.mem_get_info(kind)
    others = total - free - torch.cuda.memory_reserved(kind)
    return Room(total, f"the memory of {torch.cuda.get_device_name(kind)}", others)


def settings(spec: RunSpec, host: Host, world: World | None) -> Settings:
    """What the accounting is asked with: all ranks of a world share the weights."""
    recompute = "none" if host.recompute == "budget" else host.recompute
    ranks = 1 if world is None else world.size
    return Settings(host.micro_batch_tokens, recompute, host.recompute_layers, ranks, _varlen(spec, host))


def _varlen(spec: RunSpec, host: Host) -> bool:
    if not spec.data.document_mask:
        return False
    in_context = bool(host.layout) and int(layout_values(host.layout).get("context", 1)) > 1
    of = compute_dtype(spec.precision), spec.shape.dim_per_head, EOS, in_context
    return Packing.on(torch.device(host.device), *of).varlen


def settle(spec: RunSpec, host: Host, world: World | None = None) -> Host:
    """The host with recompute=budget resolved, which is said.

    Raises:
        DoesNotFit: the run's prediction is clearly above the memory there is, or above the budget.
    """
    if host.member is not None:  # its stack trains in one step
        return host
    asked, there = settings(spec, host, world), room(host.device)
    if host.recompute == "budget":
        budget = host.memory_budget_bytes or there.free_bytes
        asked = choose_recompute(spec, asked, budget)
        if world is not None:  # a layout recomputes all layers of a stage, or none
            asked = dataclasses.replace(asked, layers=None)
        host = dataclasses.replace(
            host, recompute=asked.recompute, recompute_layers=asked.layers, memory_budget_bytes=None
        )
        if world is None or world.leads:
            print(
                f"run {spec.run_id}: recompute={describe_recompute(asked)}: {asked.step_bytes(spec).total / 1e6:,.0f} MB of "
                f"the {budget / 1e6:,.0f} MB there are",
                file=sys.stderr,
            )
    check_fits(spec, asked, there)
    return host


@contextlib.contextmanager
def explained(spec: RunSpec, host: Host, world: World | None = None) -> Iterator[None]:
    """An error of the allocator becomes one that says what was predicted, what there is, and what would fit.

    Raises:
        DoesNotFit: memory ran out.
    """
    there = room(host.device)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DoesNotFit(explain(spec, settings(spec, host, world), there, has_failed=True)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the process (torch's CPU allocator raises a plain RuntimeError)."""
    return isinstance(error, (DoesNotFit, torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error)
        for words in ("can't allocate memory", "Cannot allocate memory", "OutOfMemoryError", DoesNotFit.__name__)
    )
