"""The one attention interface: every kernel stands behind `attend`.

Shape suffixes: B batch, T queries' positions, S keys' positions, H query heads, G key/value heads, K size of one head,
N borders of documents.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from functools import cache

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


@dataclass(frozen=True)
class Documents:
    """Where the documents of a batch lie: one of the two, as its `Packing` says."""

    mask_B1TS: Tensor | None = None
    """`document_mask`; with a context its rows are those of this rank's positions."""
    borders_N: Tensor | None = None
    """`document_borders`."""


@dataclass(frozen=True)
class Packing:
    """How attention stays within the documents that are packed into one sequence.

    Variable-length attention takes the documents' borders instead of a mask. Their number must stay, for compiled code and
    captured graphs, and be small: FlashAttention-2's backward pass holds 128 rows of fp32 for each, used or not
    (Dao-AILab/flash-attention, csrc/flash_attn/flash_api.cpp).
    """

    end: int
    """The id that ends a document, and belongs to it."""
    varlen: bool = False
    """Whether attention is given borders; else a mask."""
    room: int | None = None
    """Most documents that a sequence may have with varlen; None: as many as it has tokens."""

    @classmethod
    def on(
        cls, device: torch.device, dtype: torch.dtype, head_dim: int, end: int, in_context: bool = False
    ) -> Packing:
        """Varlen where it can be had (`takes_varlen`), else a mask."""
        return cls(end, takes_varlen(capability_of(device), dtype, head_dim, in_context) and varlen_found())

    def documents(self, tokens_BS: Tensor, rows: Tensor | slice = slice(None)) -> Documents:
        """Of these ids, without waiting for the device.

        Args:
            rows: the queries' positions, where ranks share the sequence.
        """
        if self.varlen:
            return Documents(borders_N=document_borders(tokens_BS, self.end, self.room or tokens_BS.shape[1]))
        return Documents(document_mask(tokens_BS, self.end)[:, :, rows])

    def with_room(self, tokens_BS: Tensor) -> Packing:
        """This, or one with room for the documents of these ids: a power of two, so that it seldom changes.

        Args:
            tokens_BS: on the CPU.
        """
        if not self.varlen:
            return self
        most = int((tokens_BS[:, :-1] == self.end).sum(1).max()) + 1
        if self.room is not None and most <= self.room:
            return self
        return dataclasses.replace(self, room=min(1 << (most - 1).bit_length(), tokens_BS.shape[1]))


def document_mask(tokens_BT: Tensor, end: int) -> Tensor:
    """Which positions see which, (B, 1, T, T): those of their own document, none later.

    Args:
        end: the id that ends a document, and belongs to it.
    """
    ends_BT = tokens_BT == end
    document_BT = ends_BT.cumsum(1) - ends_BT.long()
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT.tril()[:, None]


def document_borders(tokens_BT: Tensor, end: int, room: int) -> Tensor:
    """First token of each document among the B·T, then B·T: int32, (B·room + 1,), whatever the number of documents.

    Args:
        end: the id that ends a document, and belongs to it; so does each sequence's last token.
        room: most documents of a sequence, on average over the batch.
    Raises:
        RuntimeError: there are more (on a GPU, when the device comes to it).
    """
    begins_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    begins_BT[:, 1:] = tokens_BT[:, :-1] == end
    number_T = begins_BT.flatten().cumsum(0)
    asked_N = torch.arange(1, tokens_BT.shape[0] * room + 2, device=tokens_BT.device)
    borders_N = torch.searchsorted(number_T, asked_N, out_int32=True)
    torch._assert_async(borders_N[-1] == tokens_BT.numel(), "more documents than Packing.room: with_room comes first")
    return borders_N


@cache
def varlen_found() -> bool:
    """Whether this torch has variable-length attention for grouped heads: torch 2.13 has; its import takes seconds."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def takes_varlen(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, in_context: bool) -> bool:
    """Whether variable-length attention can be had, where torch has it: on flash attention's kernels alone.

    Args:
        capability: the device's compute capability; None: it is no CUDA device.
        dtype: of queries, keys and values.
        in_context: whether ranks share each sequence: keys then reach beyond this rank's queries.
    """
    if capability is None or capability < (8, 0) or in_context:
        return False
    return dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None: of another."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def attend(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    context: Context | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """Causal softmax(q·kᵀ/√K)·v; query head h reads key/value head h·G/H.

    Args:
        q_BTHK: queries, of as many positions as there are keys, or of the last position alone.
        context: where ranks share the sequence: queries, keys and values are this rank's.
        documents: which attention stays within; None: it does not.
    Returns:
        (B, T, H, K).
    """
    if documents is not None and documents.borders_N is not None:
        assert context is None
        return _varlen(q_BTHK, k_BTGK, v_BTGK, documents.borders_N)
    mask_B1TS = None if documents is None else documents.mask_B1TS
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


def _varlen(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, borders_N: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # seconds: a mask never needs it

    batch, longest, heads, _ = q_BTHK.shape
    out = varlen_attn(
        q_BTHK.flatten(0, 1),
        k_BTGK.flatten(0, 1),
        v_BTGK.flatten(0, 1),
        borders_N,
        borders_N,
        longest,
        longest,
        window_size=(-1, 0),
        enable_gqa=heads != k_BTGK.shape[2],
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, longest))


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
