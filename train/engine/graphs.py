"""Forward and backward pass as one CUDA graph: a small model's hundreds of kernels are started by one call.

A graph replays its kernels on the addresses that it was captured with (CUDA C++ Programming Guide, CUDA Graphs), so the
batch is copied into buffers that stay, and gradients are added up in buffers that stay. What it computes is what the
kernels alone compute; clipping and the optimizers, whose learning rate changes every step, run outside it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scaling.errors import InputError
from scaling.shape import ModelShape

WARMUP_PASSES = 3
"""Before a capture: compilation, choice of kernels and libraries' workspaces cannot be captured."""

Pass = Callable[[Tensor, Tensor], Tensor]
"""Inputs and targets to the loss, detached; it adds the gradients to the parameters' own."""


def check_graphs(device: torch.device, shape: ModelShape) -> None:
    """Refuse what cannot be captured.

    Raises:
        InputError: no CUDA device; experts, whose shapes follow the data.
    """
    if device.type != "cuda":
        raise InputError(f"cuda_graphs = true: device {device.type} has none: use a GPU, or cuda_graphs = false")
    if shape.experts:
        raise InputError("cuda_graphs = true: the shapes of experts follow the data: use cuda_graphs = false")


@dataclass(frozen=True)
class _Replay:
    """One shape of batch: where it is copied to, what runs then, where its loss appears."""

    inputs: Tensor
    targets: Tensor
    run: Callable[[], Tensor]


class CapturedPass:
    """A pass whose kernels are captured once for each shape of batch and replayed from then on.

    On a CPU, which has no graphs, the pass itself runs on the same buffers: so the tests see their bookkeeping.

    Args:
        work: the pass.
        parameters: what it has gradients for; they must stay at their addresses.
        variant: what else its kernels depend on: when this changes they are captured anew.
    """

    def __init__(
        self, work: Pass, parameters: Iterable[nn.Parameter], variant: Callable[[], Hashable] = lambda: None
    ) -> None:
        self._work, self._parameters, self._variant = work, list(parameters), variant
        self._captured_of = variant()
        self._gradients: list[Tensor] = []
        self._replays: dict[tuple[int, ...], _Replay] = {}

    def clear_gradients(self) -> None:
        """Begin a step: the parameters' gradients are the buffers, zero."""
        if self._gradients:
            torch._foreach_zero_(self._gradients)
        else:
            self._gradients = [torch.zeros_like(p, requires_grad=False) for p in self._parameters]
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def __call__(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Add the gradients of one batch. Returns its loss, in a tensor that the next call overwrites."""
        variant = self._variant()
        if variant != self._captured_of:
            self._replays.clear()
            self._captured_of = variant
        replay = self._replays.get(tuple(inputs.shape))
        if replay is None:
            replay = self._replays[tuple(inputs.shape)] = self._capture(inputs.clone(), targets.clone())
        else:
            replay.inputs.copy_(inputs)
            replay.targets.copy_(targets)
        return replay.run()

    def _capture(self, inputs: Tensor, targets: Tensor) -> _Replay:
        if inputs.device.type != "cuda":
            return _Replay(inputs, targets, lambda: self._work(inputs, targets))
        before = [gradient.clone() for gradient in self._gradients]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_PASSES):
                self._work(inputs, targets)
        torch.cuda.current_stream().wait_stream(stream)
        torch._foreach_copy_(self._gradients, before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._work(inputs, targets)

        def run() -> Tensor:
            graph.replay()
            return loss

        return _Replay(inputs, targets, run)
