"""Whether a run fits the memory that there is, by the accounting, and the nearest settings that do."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from scaling.accounting import TrainingBytes, recomputed_flops, training_bytes
from scaling.config import from_dict
from scaling.errors import InputError
from scaling.spec import RunSpec

CLEARLY = 1.1
"""Predictions this many times what there is are refused: the accounting is within 10% of torch's own (bench/memory.py)."""
MOST_SHARDS = 4096
RECOMPUTE: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")


class DoesNotFit(InputError):
    """A run needs more memory than there is; the message says how much, and what would fit."""


@dataclass(frozen=True)
class Room:
    """Memory that a process may use."""

    total_bytes: float
    source: str
    """Whose limit it is, for messages."""
    held_bytes: float = 0.0
    """What the process holds of it already: interpreter and libraries."""

    @property
    def free_bytes(self) -> float:
        """What is left for a training step."""
        return max(0.0, self.total_bytes - self.held_bytes)


@cache
def host_room() -> Room:
    """The tightest of the limits of this process: address space, control groups (version 1 or 2), the machine's memory.

    Asked once a process: memory that a run gave back stays with the process, for the next run to take.
    """
    resident, virtual = _held_bytes()
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rooms = [Room(machine, "this machine's memory", resident)]
    rooms += [Room(limit, f"the memory limit of control group {name}", resident) for name, limit in _group_limits()]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        rooms.append(Room(address_space, "the address space limit (ulimit -v)", virtual))
    return min(rooms, key=lambda room: room.free_bytes)


def _held_bytes() -> tuple[float, float]:
    """Resident and virtual size of this process; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        virtual, resident = Path("/proc/self/statm").read_text().split()[:2]
        page = os.sysconf("SC_PAGE_SIZE")
        return int(resident) * page, int(virtual) * page
    return 0.0, 0.0


def _group_limits() -> Iterator[tuple[str, int]]:
    """The memory limits of this process's control groups and of those that they are in, by name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if "memory" in controllers.split(","):
                root, file = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
            elif not controllers:
                root, file = Path("/sys/fs/cgroup"), "memory.max"
            else:
                continue
            folder = root / group.strip("/")
            for place in (folder, *folder.parents):
                with contextlib.suppress(OSError, ValueError):
                    yield f"/{place.relative_to(root)}", int((place / file).read_text())
                if place == root:
                    break


@dataclass(frozen=True)
class Settings:
    """What a run's memory depends on beside the run itself; none of it changes what the run computes."""

    micro_batch_tokens: int
    """Most tokens in one forward and backward pass."""
    recompute: Literal["none", "selective", "full"] = "none"
    layers: int | None = None
    """How many layers are recomputed, from the first on; None: all."""
    shards: int = 1
    """Ranks that share weights, gradients, optimizer states and the batch (FSDP)."""
    varlen: bool = False
    """Whether attention within documents is given their borders, not a mask."""

    def step_bytes(self, spec: RunSpec) -> TrainingBytes:
        """Memory of a training step of the run, by part, on one rank."""
        rank_tokens = spec.batch_tokens // self.shards
        micro_batch = max(spec.shape.seq_len, min(self.micro_batch_tokens, rank_tokens))
        return training_bytes(
            spec.shape,
            micro_batch,
            spec.optim.name,
            spec.precision,
            self.recompute,
            accumulates=rank_tokens > micro_batch,
            layers=self.layers,
            shards=self.shards,
            document_mask=spec.data.document_mask and not self.varlen,
        )

    def recomputed_flops(self, spec: RunSpec) -> float:
        """FLOPs that the backward pass of one token computes again."""
        return recomputed_flops(spec.shape, self.recompute, self.layers)


def nearest(spec: RunSpec, now: Settings, budget_bytes: float) -> list[Settings]:
    """The nearest settings whose step takes at most budget_bytes, one of each kind that has some: a smaller micro-batch, more
    recomputation, more shards; where none of them is enough alone, the fewest shards with one sequence and recompute=full.
    """
    halved = [now.micro_batch_tokens >> n for n in range(1, 64)]
    micro_batches = [tokens for tokens in halved if tokens > spec.shape.seq_len] + [spec.shape.seq_len]
    levels = RECOMPUTE[RECOMPUTE.index(now.recompute) + 1 :] if now.layers is None else ("full",)
    shards = _more_shards(spec, now.shards)
    kinds = (
        [dataclasses.replace(now, micro_batch_tokens=tokens) for tokens in micro_batches],
        [dataclasses.replace(now, recompute=level, layers=None) for level in levels],
        [dataclasses.replace(now, shards=number) for number in shards],
    )
    leanest = [Settings(spec.shape.seq_len, "full", shards=number) for number in (now.shards, *shards)]
    found = [next((s for s in kind if s.step_bytes(spec).total <= budget_bytes), None) for kind in kinds]
    alone = [settings for settings in found if settings is not None and settings != now]
    return alone or [s for s in leanest if s.step_bytes(spec).total <= budget_bytes][:1]


def _more_shards(spec: RunSpec, shards: int) -> list[int]:
    """Numbers of ranks among which the sequences of a batch can be shared, doubling."""
    sequences = spec.batch_tokens // spec.shape.seq_len
    doubled = [shards << n for n in range(1, 13)]
    return [number for number in doubled if number <= MOST_SHARDS and sequences % number == 0]


def choose_recompute(spec: RunSpec, now: Settings, budget_bytes: float) -> Settings:
    """Of recompute none, selective, full, and full of the first k layers, the one that computes least again and fits.

    Raises:
        DoesNotFit: not even recompute=full of all layers does.
    """
    depth = spec.shape.depth
    plain = dataclasses.replace(now, recompute="none", layers=None)
    options = [dataclasses.replace(plain, recompute=level) for level in RECOMPUTE]
    options += [dataclasses.replace(plain, recompute="full", layers=count) for count in range(1, depth)]
    fits = [settings for settings in options if settings.step_bytes(spec).total <= budget_bytes]
    if not fits:
        raise DoesNotFit(explain(spec, options[2], Room(budget_bytes, "the memory budget")))
    return min(fits, key=lambda settings: settings.recomputed_flops(spec))


def check_fits(spec: RunSpec, now: Settings, room: Room) -> None:
    """Refuse a run whose predicted step is clearly above the room there is.

    Raises:
        DoesNotFit: it is.
    """
    if now.step_bytes(spec).total > CLEARLY * room.free_bytes:
        raise DoesNotFit(explain(spec, now, room))


def explain(spec: RunSpec, now: Settings, room: Room, has_failed: bool = False) -> str:
    """What a step was predicted to take, what there is, and the nearest settings that fit.

    Args:
        has_failed: memory did run out with these settings: others must be predicted to take less than CLEARLY tells apart.
    """
    step = now.step_bytes(spec)
    parts = ", ".join(
        f"{name} {_size(value)}"
        for name in ("weights", "optimizer", "gradients", "activations", "working")
        if (value := getattr(step, name))
    )
    budget = min(room.free_bytes, step.total / CLEARLY) if has_failed else room.free_bytes
    fits = nearest(spec, now, budget)
    offers = "; or ".join(f"{describe(other, now)} ({_size(other.step_bytes(spec).total)})" for other in fits)
    held = f", of which this process holds {_size(room.held_bytes)} before it trains" if room.held_bytes else ""
    return (
        f"out of memory: a step of run {spec.run_id} with {describe(now)} is predicted to take {_size(step.total)} "
        f"({parts}); {room.source} is {_size(room.total_bytes)}{held}. "
        + (f"What fits: {offers}" if fits else f"Nothing fits, up to {MOST_SHARDS} ranks: use a smaller model")
    )


def explain_kill(spec: RunSpec, provenance: Mapping[str, Any]) -> str:
    """What to say of an attempt that the kernel killed: `explain`, where its provenance says what it ran with."""
    said = "killed for want of memory"
    memory = provenance.get("memory")
    if memory is None:
        return said
    now, room = from_dict(Settings, memory["settings"]), from_dict(Room, memory["room"])
    return f"{said}: {explain(spec, now, room, has_failed=True)}"


def describe(settings: Settings, beside: Settings | None = None) -> str:
    """Settings as train.run takes them; beside others, those alone that differ."""
    others = None if beside is None else dataclasses.asdict(beside)
    said = {
        "micro_batch_tokens": f"a micro-batch of {settings.micro_batch_tokens:,} tokens",
        "recompute": f"recompute={describe_recompute(settings)}",
        "shards": "1 rank" if settings.shards == 1 else f"{settings.shards} ranks that share the weights (FSDP)",
    }
    return ", ".join(text for name, text in said.items() if others is None or getattr(settings, name) != others[name])


def describe_recompute(settings: Settings) -> str:
    """none | selective | full, with how many layers where it is not all."""
    return settings.recompute + ("" if settings.layers is None else f" of the first {settings.layers}")


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
