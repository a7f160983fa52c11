"""Keys and values of the tokens read so far, so that the next token costs one position and not all of them.

Shape suffixes: B batch, S positions that there is room for, T tokens read now, G key/value heads, K size of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scaling.shape import ModelShape


class LayerCache:
    """One layer's keys and values, after norm and rotation."""

    def __init__(self, size_BSGK: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.keys_BSGK = torch.empty(size_BSGK, dtype=dtype, device=device)
        self.values_BSGK = torch.empty_like(self.keys_BSGK)
        self.length = 0
        """Positions that are filled."""

    def extend(self, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of the next T positions; returns those of all positions so far."""
        start, self.length = self.length, self.length + k_BTGK.shape[1]
        assert self.length <= self.keys_BSGK.shape[1], "the caller keeps within S"
        self.keys_BSGK[:, start : self.length] = k_BTGK
        self.values_BSGK[:, start : self.length] = v_BTGK
        return self.keys_BSGK[:, : self.length], self.values_BSGK[:, : self.length]


class KVCache:
    """Every layer's cache: 2 · depth · B · S · G · K values."""

    def __init__(
        self, shape: ModelShape, positions: int, dtype: torch.dtype, device: torch.device, batch_size: int = 1
    ) -> None:
        """
        Args:
            positions: S, at most seq_len.
        """
        size = (batch_size, positions, shape.kv_heads, shape.dim_per_head)
        self.layers = [LayerCache(size, dtype, device) for _ in range(shape.depth)]

    @property
    def length(self) -> int:
        """Positions that are filled."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forget every position."""
        for layer in self.layers:
            layer.length = 0
