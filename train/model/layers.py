"""What every layer is made of: the bias-free matrix, RMSNorm, the SwiGLU MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.model.collectives import local

NORM_EPS = 1e-6


class Linear(nn.Linear):
    """Matrix without bias: fp32 master weight, cast to the input's dtype in the product."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight).to(x.dtype))


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · gain over the last axis, computed in fp32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, size: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.scale = scale
        """Of its output, beside the gain."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, local(self.weight), NORM_EPS).to(x.dtype)
        return normed if self.scale == 1.0 else normed * self.scale


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, d_ff)
        self.up_proj = Linear(width, d_ff)
        self.down_proj = Linear(d_ff, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
