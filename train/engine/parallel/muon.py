"""Muon over sharded matrices: each is gathered on one rank, orthogonalised there, and its parts go back to their owners."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.engine.muon import orthogonalise
from train.engine.parallel.mesh import Mesh
from train.engine.parallel.shards import Cut, copies, local_part


class ShardedMuon:
    """`train.engine.muon.Muon`'s update; matrices of one size are dealt to the ranks that share them, one after another.

    Each rank sends its part of every matrix once and gets its part of every update once (two all-to-alls a size).

    Args:
        matrices: sharded 2-d parameters by name.
        momentum: of the gradient's exponential mean.
        weight_decay: decoupled.
        dtype: what the Newton–Schulz steps compute in.
    """

    def __init__(
        self,
        matrices: Iterable[tuple[str, nn.Parameter]],
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
        mesh: Mesh,
    ) -> None:
        self.momentum, self.weight_decay, self.dtype, self.mesh = momentum, weight_decay, dtype, mesh
        groups: dict[Cut, list[tuple[str, nn.Parameter]]] = {}
        self.buffers: dict[str, Tensor] = {}
        """Momentum by name, sharded as its matrix is."""
        for name, matrix in matrices:
            self.buffers[name] = torch.zeros_like(matrix, requires_grad=False)
            groups.setdefault(Cut.of(name, matrix.shape, mesh), []).append((name, matrix))
        self.groups = groups

    @torch.no_grad()
    def step(self, lr: float, squares: Tensor | None = None) -> None:
        """One update of every matrix; gradients are cleared.

        Args:
            squares: Σ update² is added to it, of this rank's parts, each value counted once over its mesh.
        """
        for cut, group in self.groups.items():
            wanted = []
            for name, matrix in group:
                assert matrix.grad is not None, "Muon steps after a backward pass through every layer"
                grad, buffer = local_part(matrix.grad), local_part(self.buffers[name])
                buffer.lerp_(grad, 1.0 - self.momentum)
                wanted.append(grad.lerp(buffer, self.momentum))
                matrix.grad = None
            updates = self._orthogonalised(cut, wanted)
            scale = -lr * 0.2 * math.sqrt(max(cut.size))
            for (_, matrix), update in zip(group, updates, strict=True):
                part = local_part(matrix)
                if self.weight_decay:
                    part.mul_(1.0 - lr * self.weight_decay)
                part.add_(update * scale)
                if squares is not None:
                    squares += (update * scale).square().sum() / copies(matrix)

    def moments(self) -> list[Tensor]:
        """The momentum of each matrix in turn, sharded as it is."""
        return list(self.buffers.values())

    def _orthogonalised(self, cut: Cut, parts: list[Tensor]) -> list[Tensor]:
        """This rank's parts of the orthogonalised matrices, given its parts of the matrices."""
        group = self.mesh.matrix
        ranks = group.size()
        places = [cut.part(rank % cut.tensor, rank // cut.tensor) for rank in range(ranks)]
        sizes = [[rows.stop - rows.start, columns.stop - columns.start] for rows, columns in places]
        counts = [rows * columns for rows, columns in sizes]
        dealt = [len(parts[rank::ranks]) for rank in range(ranks)]
        here = group.rank()
        sent = torch.cat([part.flatten() for rank in range(ranks) for part in parts[rank::ranks]])
        to_send, to_get = [n * counts[here] for n in dealt], [dealt[here] * n for n in counts]
        got = sent.new_empty(sum(to_get))
        dist.all_to_all_single(got, sent, to_get, to_send, group=group)

        whole = got.new_zeros(dealt[here], *cut.size)
        for (rows, columns), size, values in zip(places, sizes, got.split(to_get), strict=True):
            whole[:, rows, columns] = values.view(-1, *size)
        if dealt[here]:
            is_tall = cut.size[0] > cut.size[1]
            wide = (whole.mT if is_tall else whole).to(self.dtype)
            out = orthogonalise(wide).to(whole.dtype)
            whole = out.mT if is_tall else out

        back = torch.cat([whole[:, rows, columns].flatten() for rows, columns in places])
        own = sent.new_empty(sum(to_send))
        dist.all_to_all_single(own, back, to_send, to_get, group=group)
        updates: list[Tensor] = [own] * len(parts)
        for rank, values in enumerate(own.split(to_send)):
            updates[rank::ranks] = list(values.view(dealt[rank], *sizes[here]).unbind()) if dealt[rank] else []
        return updates
