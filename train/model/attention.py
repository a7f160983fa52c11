"""The one attention interface: every kernel stands behind `attend`.

Shape suffixes: B batch, T queries' positions, S keys' positions, H query heads, G key/value heads, K size of one head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from train.model.collectives import gather_sequence


@dataclass(frozen=True)
class Context:
    """Ranks that share each sequence: of 2·ranks chunks rank r has number r and, from the end, number r.

    So each has the same share of the causal triangle. Keys and values are gathered (Llama 3, arXiv 2407.21783, section 3.3.2).
    """

    group: ProcessGroup
    rank: int
    ranks: int

    @property
    def chunks(self) -> tuple[int, int]:
        """The two chunks of this rank."""
        return self.rank, 2 * self.ranks - 1 - self.rank

    def positions(self, seq_len: int) -> Tensor:
        """This rank's positions of a sequence, (seq_len / ranks,)."""
        chunks = torch.arange(seq_len).chunk(2 * self.ranks)
        return torch.cat([chunks[number] for number in self.chunks])

    def whole(self, x_BTGK: Tensor) -> Tensor:
        """Keys or values of all positions, in their order, (B, S, G, K)."""
        held = [number for r in range(self.ranks) for number in (r, 2 * self.ranks - 1 - r)]
        order = torch.tensor(sorted(range(len(held)), key=held.__getitem__), device=x_BTGK.device)
        gathered = gather_sequence(x_BTGK, self.group).unflatten(1, (2 * self.ranks, -1))
        return gathered.index_select(1, order).flatten(1, 2)


def document_mask(tokens_BT: Tensor, end: int) -> Tensor:
    """Which positions see which, (B, 1, T, T): those of their own document, none later.

    Args:
        end: the id that ends a document, and belongs to it.
    """
    ends_BT = tokens_BT == end
    document_BT = ends_BT.cumsum(1) - ends_BT.long()
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT.tril()[:, None]


def attend(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    context: Context | None = None,
    mask_B1TS: Tensor | None = None,
) -> Tensor:
    """Causal softmax(q·kᵀ/√K)·v; query head h reads key/value head h·G/H.

    Args:
        q_BTHK: queries, of as many positions as there are keys, or of the last position alone.
        context: where ranks share the sequence: queries, keys and values are this rank's.
        mask_B1TS: `document_mask`, instead of the causal one; with a context its rows are those of this rank's positions.
    Returns:
        (B, T, H, K).
    """
    if context is not None:
        k_BSGK, v_BSGK = context.whole(k_BTGK), context.whole(v_BTGK)
        parts = []
        masks = [None, None] if mask_B1TS is None else mask_B1TS.chunk(2, dim=2)
        for number, q_part, mask in zip(context.chunks, q_BTHK.chunk(2, dim=1), masks, strict=True):
            size = q_part.shape[1]
            end = (number + 1) * size
            if mask is None:
                mask = torch.ones(size, end, dtype=torch.bool, device=q_part.device).tril(end - size)
            parts.append(_softmax(q_part, k_BSGK[:, :end], v_BSGK[:, :end], mask[..., :end]))
        return torch.cat(parts, dim=1)
    assert q_BTHK.shape[1] in (1, k_BTGK.shape[1])
    return _softmax(q_BTHK, k_BTGK, v_BTGK, mask_B1TS)


def _softmax(q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Tensor | None = None) -> Tensor:
    out = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGK.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and q_BTHK.shape[1] > 1,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )
    return out.transpose(1, 2)
