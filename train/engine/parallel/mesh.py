"""A layout on a mesh of ranks: who shares what with whom, and what a layout asks of model and batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from scaling.errors import InputError
from scaling.layout import describe_layout
from scaling.spec import RunSpec
from scaling.steptime import Layout
from train.engine.parallel.world import World
from train.model.attention import Context


def complete_layout(spec: RunSpec, fixed: Mapping[str, int | str], ranks: int, micro_batch_tokens: int) -> Layout:
    """The layout with these values: all other ranks are data ranks, which share the weights too (FSDP).

    A data rank takes as many sequences at a time as micro_batch_tokens allow; in a pipeline at most as many as fill it.
    """
    values: dict[str, Any] = {"shard": "parameters", **fixed}
    model = math.prod(values.get(name, 1) for name in ("tensor", "pipeline", "context"))
    values.setdefault("data", max(1, ranks // model))
    if "micro_batch" not in values:
        rows = spec.batch_tokens // spec.shape.seq_len // values["data"]
        most = max(1, micro_batch_tokens // spec.shape.seq_len)
        stages = values.get("pipeline", 1)
        fits = [n for n in range(1, rows + 1) if rows % n == 0 and n <= most and rows // n % stages == 0]
        values["micro_batch"] = max(fits, default=1)
    return Layout(**values)


def check_layout(spec: RunSpec, layout: Layout, ranks: int) -> None:
    """Refuse a layout that does not divide the ranks, the model or the batch.

    Raises:
        InputError: which number it is, and those that would do.
    """
    shape, rows = spec.shape, spec.batch_tokens // spec.shape.seq_len
    where = f"layout ({describe_layout(layout)})"
    if layout.devices != ranks:
        raise InputError(
            f"{where} is of {layout.devices} ranks, there are {ranks}: data × tensor × pipeline × context must be {ranks}"
        )
    local_seq = shape.seq_len // layout.context
    for what, number, parts, by in (
        ("data ranks", layout.data, layout.replicas, "replicas"),
        ("sequences a step", rows, layout.data, "data"),
        ("sequences of a data rank", rows // layout.data, layout.micro_batch, "micro_batch"),
        ("query heads", shape.n_heads, layout.tensor, "tensor"),
        ("key/value heads", shape.kv_heads, layout.tensor, "tensor"),
        ("d_ff", shape.expert_d_ff, layout.tensor, "tensor"),
        ("vocabulary entries", shape.vocab_size, layout.tensor, "tensor"),
        ("tokens of a sequence", shape.seq_len, 2 * layout.context if layout.context > 1 else 1, "2 × context"),
        ("tokens of a sequence's part", local_seq, layout.tensor, "tensor"),
    ):
        if parts > number or number % parts:
            fits = [n for n in range(1, min(number, ranks) + 1) if number % n == 0]
            raise InputError(f"{where}: {by} {parts} does not divide {number} {what}: use one of {fits}")
    stages = layout.pipeline * layout.chunks
    if layout.chunks > 1 and layout.schedule == "1f1b":
        raise InputError(f"{where}: chunks = {layout.chunks} needs schedule=interleaved or zero_bubble")
    if stages > shape.depth:
        raise InputError(
            f"{where}: {stages} pipeline stages for {shape.depth} layers: pipeline × chunks must be at most {shape.depth}"
        )
    passes = rows // layout.data // layout.micro_batch
    if layout.pipeline > 1 and passes < layout.pipeline:
        raise InputError(
            f"{where}: {passes} micro-batches of {layout.micro_batch} do not fill {layout.pipeline} stages: "
            f"use micro_batch at most {max(1, rows // layout.data // layout.pipeline)}"
        )
    if layout.pipeline > 1 and layout.schedule != "1f1b" and passes % layout.pipeline:
        raise InputError(
            f"{where}: {passes} micro-batches are no multiple of {layout.pipeline} stages: change micro_batch"
        )
    if layout.pipeline > 1 and shape.tied_embeddings:
        raise InputError(f"{where}: tied embeddings need pipeline = 1, as the first and last stage share the matrix")
    for stage in spec.batch_ramp:
        if layout.pipeline > 1 or stage.batch_tokens // shape.seq_len % layout.data:
            raise InputError(
                f"{where}: batch_ramp needs pipeline = 1, and data ranks that divide the {stage.batch_tokens // shape.seq_len} "
                "sequences of its smallest steps too"
            )
    if shape.experts is not None and shape.experts.balance == "loss" and layout.pipeline > 1:
        raise InputError(
            f"{where}: experts with balance=loss need pipeline = 1, as the last stage alone has a loss to add theirs to: use "
            "balance=bias, or data, tensor and context ranks"
        )


class Mesh:
    """Ranks are numbered tensor first, then context, data, pipeline."""

    def __init__(self, layout: Layout, world: World, device: torch.device) -> None:
        self.layout, self.world, self.device = layout, world, device
        data, context, tensor = layout.data, layout.context, layout.tensor
        self.devices: DeviceMesh = init_device_mesh(
            device.type,
            (layout.pipeline, layout.replicas, layout.shards, tensor),
            mesh_dim_names=("pipeline", "replica", "shard", "tensor"),
        )
        rank = world.rank
        self.tensor_rank = rank % tensor
        self.data_rank = rank // (tensor * context) % data
        self.shard_rank = self.devices.get_local_rank("shard")
        self.pipeline_rank = rank // (tensor * context * data)
        self.context: Context | None = None
        if context > 1:
            peers = [
                [(outer * context + part) * tensor + inner for part in range(context)]
                for outer in range(world.size // (context * tensor))
                for inner in range(tensor)
            ]
            group, _ = dist.new_subgroups_by_enumeration(peers)
            self.context = Context(group, rank // tensor % context, context)
        matrix, _ = dist.new_subgroups(group_size=layout.shards * tensor)
        self.matrix: ProcessGroup = matrix
        """The ranks that together hold each matrix once."""

    @property
    def tensor(self) -> ProcessGroup | None:
        """The ranks that share each matrix product; None: this one alone."""
        return self.devices["tensor"].get_group() if self.layout.tensor > 1 else None

    @property
    def fully_shard(self) -> DeviceMesh:
        """What `fully_shard` takes: shards, and replicas where there are."""
        return self.devices["replica", "shard"] if self.layout.replicas > 1 else self.devices["shard"]

    def rows(self, batch_size: int) -> slice:
        """This rank's sequences of a global batch."""
        size = batch_size // self.layout.data
        return slice(self.data_rank * size, (self.data_rank + 1) * size)

    def positions(self, seq_len: int) -> slice | torch.Tensor:
        """This rank's positions of a sequence."""
        return slice(None) if self.context is None else self.context.positions(seq_len)
