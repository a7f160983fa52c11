"""The model of a run on its layout: forward and backward over all of its ranks, loss and gradient norm as one process has them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from scaling.errors import InputError
from scaling.layout import describe_layout, layout_values
from scaling.spec import RunSpec
from train.engine.parallel.mesh import Mesh, check_layout, complete_layout
from train.engine.parallel.shards import local_part, square_sum
from train.engine.parallel.stage import Stage
from train.engine.parallel.world import START_TIMEOUT_S, World
from train.model.experts import Router, evenness, routers
from train.model.kernels import Recompute


class ParallelModel:
    """This rank's stages. Every rank calls the same methods."""

    def __init__(self, spec: RunSpec, mesh: Mesh) -> None:
        self.spec, self.mesh, self.shape = spec, mesh, spec.shape
        layout, depth = mesh.layout, spec.shape.depth
        count = layout.pipeline * layout.chunks
        borders = [
            n * (depth // count) + min(n, depth % count) for n in range(count + 1)
        ]  # the first ones take the rest
        self.numbers = list(range(mesh.pipeline_rank, count, layout.pipeline))
        self.stages = [Stage(spec, mesh, borders[n], borders[n + 1]) for n in self.numbers]
        self.count = count
        self._schedule = self._pipeline() if layout.pipeline > 1 else None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters, sharded, by the decoder's names."""
        for stage in self.stages:
            yield from stage.decoder.named_parameters()

    def state(self) -> dict[str, Tensor]:
        """This rank's parameters, sharded, and the routers' biases, which every rank of a stage has whole; by the decoder's names."""
        biases = [item for stage in self.stages for item in stage.decoder.state_dict(keep_vars=True).items()]
        parameters = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return parameters | {name: tensor for name, tensor in biases if not isinstance(tensor, nn.Parameter)}

    def train(self, mode: bool = True) -> None:
        """As nn.Module.train."""
        for stage in self.stages:
            stage.train(mode)

    def eval(self) -> None:
        """As nn.Module.eval."""
        self.train(False)

    def make_room(self, tokens_BT: Tensor) -> None:
        """As Decoder.make_room."""
        for stage in self.stages:
            stage.decoder.make_room(tokens_BT)

    def _pipeline(self) -> Schedule1F1B | ScheduleInterleaved1F1B | ScheduleInterleavedZeroBubble:
        layout, shape = self.mesh.layout, self.spec.shape
        group = self.mesh.devices["pipeline"].get_group()
        stages = [
            PipelineStage(
                stage,
                number,
                self.count,
                self.mesh.device,
                input_args=self._shape_of_input(stage, layout.micro_batch),
                output_args=self._shape_of_output(stage, layout.micro_batch),
                group=group,
            )
            for number, stage in zip(self.numbers, self.stages, strict=True)
        ]
        passes = self.spec.batch_tokens // shape.seq_len // layout.data // layout.micro_batch

        def share_of_loss(nll: Tensor, _: Tensor) -> Tensor:
            return nll.sum() / self.spec.batch_tokens

        if layout.schedule == "1f1b":
            return Schedule1F1B(stages[0], passes, loss_fn=share_of_loss, scale_grads=False)
        kind = ScheduleInterleaved1F1B if layout.schedule == "interleaved" else ScheduleInterleavedZeroBubble
        return kind(stages, passes, loss_fn=share_of_loss, scale_grads=False)  # type: ignore[arg-type]

    def _between(self, batch: int) -> Tensor:
        """What passes between stages, on the meta device."""
        layout, shape = self.mesh.layout, self.spec.shape
        positions = shape.seq_len // layout.context // layout.tensor
        size = (batch, positions, shape.width)
        return torch.empty(size, dtype=self.stages[0].decoder.dtype, device="meta", requires_grad=True)

    def _shape_of_input(self, stage: Stage, batch: int) -> Tensor:
        if not stage.is_first:
            return self._between(batch)
        positions = self.spec.shape.seq_len // self.mesh.layout.context
        return torch.empty(batch, positions, dtype=torch.int64, device="meta")

    def _shape_of_output(self, stage: Stage, batch: int) -> Tensor:
        return torch.empty(1, device="meta", requires_grad=True) if stage.is_last else self._between(batch)

    def _own(self, batch_BT: Tensor) -> Tensor:
        """This rank's positions of these rows."""
        return batch_BT[:, self.mesh.positions(self.spec.shape.seq_len)].to(self.mesh.device)

    def gradients(
        self, inputs_BT: Tensor, targets_BT: Tensor, clip_norm: float, scale: float = 1.0
    ) -> tuple[float, float]:
        """Forward and backward of a global batch: gradients of the mean loss are left on the parameters, clipped.

        Args:
            inputs_BT: this rank's rows of the batch.
            targets_BT: theirs.
            scale: the run's batch_tokens over those of this batch.
        Returns:
            Summed loss over the batch, nats, and the global gradient norm before clipping: on every rank the same.
        """
        inputs, given = self._own(inputs_BT), self._given(inputs_BT, targets_BT)
        for stage in self.stages:
            stage.nll.zero_()
        if self._schedule is None:
            self._accumulate(inputs, given)
        else:
            feed = (inputs,) if self.stages[0].is_first else ()
            wanted = given["targets_BT"] if self.stages[-1].is_last else None
            self._schedule.step(*feed, target=wanted, return_outputs=False, **given)
        squares = square_sum(self.named_parameters())
        nll, square = self._total(sum(float(stage.nll) for stage in self.stages), float(squares))
        norm = scale * square**0.5
        self._scale_gradients(scale * min(1.0, clip_norm / (norm + 1e-6)))
        return nll, norm

    def _given(self, inputs_BT: Tensor, targets_BT: Tensor) -> dict[str, Any]:
        """What every stage is given beside what it reads from the one before."""
        given = {"targets_BT": self._own(targets_BT)}
        return given | ({"tokens_BS": inputs_BT.to(self.mesh.device)} if self.spec.data.document_mask else {})

    def _accumulate(self, inputs: Tensor, given: dict[str, Tensor]) -> None:
        (stage,) = self.stages
        micro, keeps = self.mesh.layout.micro_batch, self.mesh.layout.shard == "optimizer"
        parts = inputs.split(micro)
        for number, x in enumerate(parts):
            is_last = number == len(parts) - 1
            for module in stage.sharded():
                module.set_requires_gradient_sync(is_last or not keeps, recurse=False)
                if keeps:
                    module.set_reshard_after_backward(is_last, recurse=False)
                module.set_is_last_backward(is_last)
            rows = {name: tensor.split(micro)[number] for name, tensor in given.items()}
            (stage(x, **rows).sum() / self.spec.batch_tokens).backward()

    def _total(self, nll: float, square: float) -> tuple[float, float]:
        """Sums over the ranks; tensor-parallel ranks have the same loss, which counts once."""
        values = torch.tensor([nll if self.mesh.tensor_rank == 0 else 0.0, square], dtype=torch.float64)
        dist.all_reduce(values)
        return float(values[0]), float(values[1])

    @torch.no_grad()
    def _scale_gradients(self, factor: float) -> None:
        for _, parameter in self.named_parameters():
            if parameter.grad is not None:
                local_part(parameter.grad).mul_(factor)

    @torch.no_grad()
    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> float:
        """Summed loss of any number of sequences, which every rank is given, forward alone; on every rank the same."""
        data = self.mesh.layout.data
        inputs, targets = inputs_BT[self.mesh.data_rank :: data], targets_BT[self.mesh.data_rank :: data]
        is_idle = not len(inputs)
        if is_idle:  # gathering the weights takes every rank
            inputs, targets = inputs_BT[:1], targets_BT[:1]
        for stage in self.stages:
            stage.nll.zero_()
        self._forward(self._own(inputs), self._given(inputs, targets))
        nll = 0.0 if is_idle else sum(float(stage.nll) for stage in self.stages)
        return self._total(nll, 0.0)[0]

    def follow_load(self) -> dict[str, float]:
        """As train.model.experts.follow_load, with the load of all ranks."""
        experts = self.shape.experts
        assert experts is not None
        load_LE = torch.zeros(self.shape.depth, experts.n_experts, device=self.mesh.device)
        for stage in self.stages:
            load_LE[stage.numbers] = torch.stack([_load(router) for router in routers(stage)])
        dist.all_reduce(load_LE)
        load_LE /= self.mesh.layout.tensor  # tensor-parallel ranks have counted the same tokens
        for stage in self.stages:
            for router, load_E in zip(routers(stage), load_LE[stage.numbers], strict=True):
                router.load_E = load_E
                router.follow_load()
        return evenness(load_LE)

    @property
    def uncompiled(self) -> str | None:
        """Why the layers of this layout cannot be compiled; None: they can."""
        layout = self.mesh.layout
        if self.shape.experts:
            return "the shapes of experts follow the data"
        if layout.tensor > 1 or layout.context > 1:
            return (
                "tensor and context ranks speak to each other within a layer, and their collectives are not compiled"
            )
        if layout.schedule == "zero_bubble":
            return "zero bubble computes weight gradients apart, which a compiled layer computes with the others"
        return None

    def compile(self) -> None:
        """Compile each layer.

        Raises:
            InputError: a layout whose layers hold collectives.
        """
        if self.uncompiled:
            where = describe_layout(self.mesh.layout)
            raise InputError(f"compile=block with layout ({where}): {self.uncompiled}: use compile=none")
        for stage in self.stages:
            for layer in stage.layers:
                layer.forward = torch.compile(layer.forward, dynamic=False)

    def _forward(self, inputs: Tensor, given: dict[str, Tensor]) -> None:
        """Through all stages one after another."""
        group, here, ranks = None, self.mesh.pipeline_rank, self.mesh.layout.pipeline
        if ranks > 1:
            group = self.mesh.devices["pipeline"].get_group()
        x = inputs
        for number, stage in zip(self.numbers, self.stages, strict=True):
            if not stage.is_first:
                x = torch.empty_like(self._between(len(inputs)), device=self.mesh.device, requires_grad=False)
                dist.recv(x, group=group, group_src=(here - 1) % ranks)
            x = stage(x, **given)
            if number + 1 < self.count:
                dist.send(x.contiguous(), group=group, group_dst=(here + 1) % ranks)
        for stage in self.stages:
            for module in stage.sharded():
                module.reshard()


def _load(router: Router) -> Tensor:
    assert router.load_E is not None, "a step follows a forward pass"
    return router.load_E


def parallel_model(
    spec: RunSpec, layout: str, micro_batch_tokens: int, recompute: Recompute, world: World, device: torch.device
) -> ParallelModel:
    """A run's model, with its initial weights, on the ranks of the world.

    Args:
        layout: what is fixed of the layout, as tensor=2,context=2; the rest is found by `complete_layout`.
        micro_batch_tokens: most tokens that a data rank takes at a time.
        recompute: as `train.model.kernels.set_up` takes it, unless the layout says.
    Raises:
        InputError: no such layout divides ranks, model and batch.
    """
    world.watch(START_TIMEOUT_S)
    fixed = {"recompute": recompute, **(layout_values(layout) if layout else {})}
    found = complete_layout(spec, fixed, world.size, micro_batch_tokens)
    check_layout(spec, found, world.size)
    if world.leads:
        print(f"run {spec.run_id} on {world.size} ranks: {describe_layout(found)}", file=sys.stderr)
    return ParallelModel(spec, Mesh(found, world, device))
