"""Runs of one shape and batch trained as one: their weights stacked, each product of theirs one batched product.

A small model leaves a GPU idle between its kernels, so R runs at once cost little more than one. Each run keeps its own
loop (train.engine.loop), in a thread: its data, optimizers, evaluations, checkpoints and record. Only the forward and the
backward pass are common: the last of the threads to bring its batch computes them for all. Losses are those of separate
runs up to rounding: the sums of a batched product have another order.

Shape suffixes: R runs, B batch, T sequence, D width, V vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.spec import RunSpec
from train.model.attention import Packing
from train.model.decoder import Decoder
from train.model.layers import NORM_EPS, Linear, RMSNorm
from train.model.loss import linear_cross_entropy

T = TypeVar("T")


def stack_key(spec: RunSpec) -> tuple[object, ...] | None:
    """Runs of one key can be stacked; None: this run cannot be (experts choose their own products, ramps their own
    batches, a transfer its own multipliers)."""
    if spec.shape.experts or spec.batch_ramp or spec.transfer is not None:
        return None
    return spec.shape, spec.batch_tokens, spec.precision, spec.optim.z_loss, spec.data.document_mask


class StackedLinear(nn.Module):
    """`Linear` of R runs: weight (R, out, in), input (R·B, T, in)."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack(list(weights)))

    def forward(self, x: Tensor) -> Tensor:
        runs, n_out, n_in = self.weight.shape
        product = torch.bmm(x.reshape(runs, -1, n_in), self.weight.to(x.dtype).mT)
        return product.view(*x.shape[:-1], n_out)


class StackedNorm(nn.Module):
    """`RMSNorm` of R runs: gains (R, size), input (R·B, …, size)."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack(list(weights)))

    def forward(self, x: Tensor) -> Tensor:
        runs, size = self.weight.shape
        normed = F.rms_norm(x.float(), (size,), None, NORM_EPS).view(runs, -1, size) * self.weight[:, None]
        return normed.view(x.shape).to(x.dtype)


class StackedEmbedding(nn.Module):
    """An embedding of R runs: weight (R, V, D), ids (R·B, T)."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack(list(weights)))

    def forward(self, ids: Tensor) -> Tensor:
        runs, vocabulary, _ = self.weight.shape
        first = torch.arange(runs, device=ids.device).repeat_interleave(len(ids) // runs) * vocabulary
        return F.embedding(ids + first[:, None], self.weight.flatten(0, 1))


STACKED: dict[type[nn.Module], Callable[[Sequence[Tensor]], nn.Module]] = {
    Linear: StackedLinear,
    RMSNorm: StackedNorm,
    nn.Embedding: StackedEmbedding,
}


class StackedDecoder:
    """The decoders of R runs as one. Their parameters become views of the stacked ones, so that each run's optimizers,
    evaluations and checkpoints go on with its own."""

    def __init__(self, models: Sequence[Decoder]) -> None:
        self.models = list(models)
        first = self.models[0]
        with torch.device("meta"):
            self.stacked = Decoder(first.shape)
        self.stacked.dtype = first.dtype
        self.stacked.cos, self.stacked.sin = first.cos, first.sin
        for path, module in list(self.stacked.named_modules()):
            kind = STACKED.get(type(module))
            if kind is None or (path == "lm_head" and first.shape.tied_embeddings):
                continue
            parent, _, name = path.rpartition(".")
            weights = [model.get_parameter(f"{path}.weight").data for model in self.models]
            setattr(self.stacked.get_submodule(parent), name, kind(weights))
        self.named = [
            (parameter, [model.get_parameter(name) for model in self.models])
            for name, parameter in self.stacked.named_parameters()
            if parameter.device.type != "meta"
        ]
        for parameter, owned in self.named:
            for own, part in zip(owned, parameter.data, strict=True):
                own.data = part

    def gradients(self, inputs_RBT: Tensor, targets_RBT: Tensor, z_loss: float, scale: float, micro: int) -> Tensor:
        """Leave the gradients of each run's loss, summed over its tokens and times `scale`, with its own parameters.

        Args:
            micro: most sequences of a run in one pass.
        Returns:
            The summed losses in nats, (R,).
        """
        tied = self.stacked.shape.tied_embeddings
        head_RVD = self.stacked.get_parameter("model.embed_tokens.weight" if tied else "lm_head.weight")
        losses = torch.zeros(len(self.models), device=inputs_RBT.device)
        self.stacked.packing = max((model.packing for model in self.models), key=_room)
        for inputs, targets in zip(inputs_RBT.split(micro, 1), targets_RBT.split(micro, 1), strict=True):
            hidden_RBTD = self.stacked.hidden(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
            parts = [
                linear_cross_entropy(h, w, t, z_loss) for h, w, t in zip(hidden_RBTD, head_RVD, targets, strict=True)
            ]
            each = torch.stack(parts)
            (each.sum() * scale).backward()
            losses += each.detach()
        for parameter, owned in self.named:
            assert parameter.grad is not None
            for own, gradient in zip(owned, parameter.grad, strict=True):
                own.grad = gradient
            parameter.grad = None
        return losses


def _room(packing: Packing | None) -> float:
    return 0.0 if packing is None else packing.room or math.inf


@dataclass
class Stack:
    """Where the threads of runs that train together meet, once a step."""

    members: set[int]
    """Threads that still train."""
    _brought: dict[int, tuple[Decoder, Tensor, Tensor]] = field(default_factory=dict)
    _results: dict[int, Tensor | BaseException] = field(default_factory=dict)
    _decoder: tuple[tuple[int, ...], StackedDecoder] | None = None
    _meeting: threading.Condition = field(default_factory=threading.Condition)

    def gradients(
        self, member: int, model: Decoder, batch: tuple[Tensor, Tensor], z_loss: float, scale: float, micro: int
    ) -> Tensor:
        """Bring a batch, wait for the others', and have the gradients of one's own loss. Returns the summed loss.

        Raises:
            Exception: what the common pass raised, in every thread.
        """
        with self._meeting:
            self._brought[member] = model, *batch
            self._meeting.notify_all()
            while member not in self._results:
                if self._brought.keys() == self.members:
                    self._compute(z_loss, scale, micro)
                    self._meeting.notify_all()
                else:
                    self._meeting.wait()
            result = self._results.pop(member)
        if isinstance(result, BaseException):
            raise result
        return result

    def leave(self, member: int) -> None:
        """A run has ended: the others go on without it."""
        with self._meeting:
            self.members.discard(member)
            self._meeting.notify_all()

    def _compute(self, z_loss: float, scale: float, micro: int) -> None:
        present = tuple(sorted(self._brought))
        models, inputs, targets = zip(*(self._brought[member] for member in present), strict=True)
        self._brought.clear()
        try:
            if self._decoder is None or self._decoder[0] != present:
                self._decoder = present, StackedDecoder(models)
            losses = self._decoder[1].gradients(torch.stack(inputs), torch.stack(targets), z_loss, scale, micro)
        except Exception as error:
            self._results.update(dict.fromkeys(present, error))
        else:
            self._results.update(zip(present, losses, strict=True))


@dataclass(frozen=True)
class Member:
    """One run's place in a stack: what its trainer is given."""

    stack: Stack
    number: int

    def gradients(self, spec: RunSpec, model: Decoder, inputs_BT: Tensor, targets_BT: Tensor, micro: int) -> Tensor:
        """The summed loss of the run's batch; the gradients of its mean are with the model's parameters."""
        batch = inputs_BT, targets_BT
        return self.stack.gradients(self.number, model, batch, spec.optim.z_loss, 1 / spec.batch_tokens, micro)


def together(works: Sequence[Callable[[Member], T]]) -> list[T]:
    """Do each of the works in a thread of its own, all of them members of one stack. Returns what they return.

    Raises:
        BaseException: what the first of them raised.
    """
    stack = Stack(set(range(len(works))))
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(number: int) -> None:
        try:
            results[number] = works[number](Member(stack, number))
        except BaseException as error:
            errors[number] = error
        finally:
            stack.leave(number)

    threads = [threading.Thread(target=run, args=(number,), name=f"run-{number}") for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(len(works))]
