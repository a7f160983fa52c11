"""The one attention interface: every kernel stands behind `attend`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
    """Causal softmax(q·kᵀ/√K)·v; query head h reads key/value head h·G/H.

    Returns:
        (B, T, H, K).
    """
    out = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGK.transpose(1, 2),
        is_causal=True,
        enable_gqa=q_BTHK.shape[2] != k_BTGK.shape[2],
    )
    return out.transpose(1, 2)
