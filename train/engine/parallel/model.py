"""The model of a run on its layout: forward and backward over all of its ranks, loss and gradient norm as one process has them."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from scaling.layout import describe_layout, layout_values
from scaling.spec import RunSpec
from train.engine.parallel.mesh import Mesh, check_layout, complete_layout
from train.engine.parallel.shards import local_part, square_sum
from train.engine.parallel.stage import Stage
from train.engine.parallel.world import START_TIMEOUT_S, World
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

    def train(self, mode: bool = True) -> None:
        """As nn.Module.train."""
        for stage in self.stages:
            stage.train(mode)

    def eval(self) -> None:
        """As nn.Module.eval."""
        self.train(False)

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
        inputs, targets = self._own(inputs_BT), self._own(targets_BT)
        for stage in self.stages:
            stage.nll.zero_()
        if self._schedule is None:
            self._accumulate(inputs, targets)
        else:
            feed = (inputs,) if self.stages[0].is_first else ()
            wanted = targets if self.stages[-1].is_last else None
            self._schedule.step(*feed, target=wanted, targets_BT=targets, return_outputs=False)
        squares = square_sum(self.named_parameters())
        nll, square = self._total(sum(float(stage.nll) for stage in self.stages), float(squares))
        norm = scale * square**0.5
        self._scale_gradients(scale * min(1.0, clip_norm / (norm + 1e-6)))
        return nll, norm

    def _accumulate(self, inputs: Tensor, targets: Tensor) -> None:
        (stage,) = self.stages
        micro = self.mesh.layout.micro_batch
        pairs = list(zip(inputs.split(micro), targets.split(micro), strict=True))
        for number, (x, y) in enumerate(pairs, 1):
            is_last = number == len(pairs)
            for module in stage.sharded():
                module.set_requires_gradient_sync(is_last, recurse=False)
                if self.mesh.layout.shard == "optimizer":
                    module.set_reshard_after_backward(is_last, recurse=False)
                module.set_is_last_backward(is_last)
            (stage(x, y).sum() / self.spec.batch_tokens).backward()

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
        self._forward(self._own(inputs), self._own(targets))
        nll = 0.0 if is_idle else sum(float(stage.nll) for stage in self.stages)
        return self._total(nll, 0.0)[0]

    def _forward(self, inputs: Tensor, targets: Tensor) -> None:
        """Through all stages one after another."""
        group, here, ranks = None, self.mesh.pipeline_rank, self.mesh.layout.pipeline
        if ranks > 1:
            group = self.mesh.devices["pipeline"].get_group()
        x = inputs
        for number, stage in zip(self.numbers, self.stages, strict=True):
            if not stage.is_first:
                x = torch.empty_like(self._between(len(inputs)), device=self.mesh.device, requires_grad=False)
                dist.recv(x, group=group, group_src=(here - 1) % ranks)
            x = stage(x, targets)
            if number + 1 < self.count:
                dist.send(x.contiguous(), group=group, group_dst=(here + 1) % ranks)
        for stage in self.stages:
            for module in stage.sharded():
                module.reshard()


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
