"""Muon, batched: matrices of one shape are orthogonalised together.

The update rule is torch.optim.Muon's with adjust_lr_fn="match_rms_adamw" (the tests hold it against that); a small
model spends a third of its step there in hundreds of tiny products, and a thirtieth here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Quintic whose five-fold iteration sends singular values of (0, 1] near 1 (Jordan et al. 2024)."""
STEPS = 5


def orthogonalise(stack_SRC: Tensor) -> Tensor:
    """UVᵀ of each matrix USVᵀ of the stack (S, R, C), R ≤ C, roughly: five Newton–Schulz steps aX + (bA + cA²)X, A = XXᵀ."""
    a, b, c = NEWTON_SCHULZ
    x = stack_SRC / stack_SRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon:
    """Momentum (Nesterov), orthogonalised; decoupled weight decay; update scaled by .2·√max(R, C) to AdamW's RMS.

    Args:
        matrices: 2-d parameters.
        momentum: of the gradient's exponential mean.
        weight_decay: decoupled.
        dtype: what the Newton–Schulz steps compute in.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], momentum: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        self.momentum, self.weight_decay, self.dtype = momentum, weight_decay, dtype
        matrices = list(matrices)
        self.indices = by_shape(matrices)
        self.groups: list[list[Tensor]] = [[matrices[index] for index in group] for group in self.indices]
        self.buffers = [
            torch.zeros(len(group), min(group[0].shape), max(group[0].shape), device=group[0].device)
            for group in self.groups
        ]

    @torch.no_grad()
    def step(self, lr: float, squares: Tensor | None = None) -> None:
        """One update of every matrix; gradients are cleared.

        Args:
            squares: Σ update² is added to it, without weight decay's part.
        """
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            grads = torch.stack([_wide(_gradient(p)) for p in group])
            buffer.lerp_(grads, 1.0 - self.momentum)
            update = orthogonalise(grads.lerp_(buffer, self.momentum).to(self.dtype)).to(buffer.dtype)
            update *= -lr * 0.2 * math.sqrt(update.shape[2])
            if squares is not None:
                squares += update.square().sum()
            if self.weight_decay:
                torch._foreach_mul_(group, 1.0 - lr * self.weight_decay)
            torch._foreach_add_(
                group, [u if p.shape == u.shape else u.mT for p, u in zip(group, update, strict=True)]
            )
            for parameter in group:
                parameter.grad = None

    def moments(self) -> list[Tensor]:
        """The momentum of each matrix in turn, as views of the matrices' own shapes."""
        found: dict[int, Tensor] = {}
        for indices, group, buffer in zip(self.indices, self.groups, self.buffers, strict=True):
            for index, matrix, moment in zip(indices, group, buffer, strict=True):
                found[index] = moment if matrix.shape == moment.shape else moment.mT
        return [found[index] for index in sorted(found)]

    def state_dict(self) -> dict[str, Any]:
        """The momentum of each shape's matrices."""
        return {"buffers": self.buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for buffer, saved in zip(self.buffers, state["buffers"], strict=True):
            buffer.copy_(saved)


def by_shape(matrices: Iterable[Tensor]) -> list[list[int]]:
    """Indices of the matrices that have one shape, or its transpose, together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault((min(matrix.shape), max(matrix.shape)), []).append(index)
    return list(groups.values())


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "Muon steps after a backward pass through every layer"
    return parameter.grad
