"""The one attention interface: every kernel stands behind `attend`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Causal softmax(q·kᵀ/√K)·v; query head h reads key/value head h·G/H.

    Args:
        q_BTHK: queries, of as many positions as there are keys, or of the last position alone.
    Returns:
        (B, T, H, K).
    """
    assert q_BTHK.shape[1] in (1, k_BTGK.shape[1])
    out = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGK.transpose(1, 2),
        is_causal=q_BTHK.shape[1] > 1,
        enable_gqa=q_BTHK.shape[2] != k_BTGK.shape[2],
    )
    return out.transpose(1, 2)
