"""Hyperparameters that keep their best values as width and depth grow: µP and CompleteP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scaling.errors import InputError
from scaling.shape import ModelShape


@dataclass(frozen=True)
class Multipliers:
    """What a model's parts are multiplied by; 1: as without a transfer. Biases there are none."""

    adamw_lr: float = 1.0
    """AdamW's learning rate of the layers' matrices; their weight decay is divided by it."""
    muon_lr: float = 1.0
    """Muon's learning rate; its weight decay is divided by it."""
    eps: float = 1.0
    """AdamW's ε of embedding, head and final norm."""
    layer_eps: float = 1.0
    """AdamW's ε of what is in the layers."""
    head_init: float = 1.0
    """Standard deviation of the head's initial weights, over width^-½."""
    branch_init: float = 1.0
    """Standard deviation of the residual outputs' initial weights, over (2·depth·fan_in)^-½."""
    logits: float = 1.0
    """The final norm's output, which the head reads."""
    scores: float = 1.0
    """Attention's scores, over q·k/√head_dim."""
    branch: float = 1.0
    """What a residual branch adds to the stream."""


@dataclass(frozen=True)
class Transfer:
    """How a run's hyperparameters, which are those of a base shape, become its own.

    With m = width / base width, ℓ = depth / base depth, K = head_dim:

        part                               mup         completep
        layers' matrices, AdamW's rate     1/m         1/m          (ℓ^(α−1) = 1 at CompleteP's α = 1)
        layers' matrices, Muon's rate      1/√m        1/√m
        their weight decay                 1 over the rate's factor, so that rate × decay stays
        AdamW's ε; in the layers           1/m         1/m; 1/(m·ℓ)
        logits                             1/m         1/m
        head's initial σ                   the base's, width_base^-½
        other matrices' initial σ          fan_in^-½, as without
        attention's scores                 √(K_base/K), which makes them q·k/K but for a constant
        residual branch                    1           1/ℓ
        residual outputs' initial σ        (2·depth·fan_in)^-½ as without; completep: with the base's depth
        embedding, head, norms             rate as without

    mup: Yang et al. 2022 (Tensor Programs V, arXiv 2203.03466, table 8); ε and decoupled decay, which it leaves open, as
    CompleteP has them. completep: Dey et al. 2025 (arXiv 2505.01618, table 1). Muon's rate is not in either: its update, scaled to AdamW's root mean
    square, has the spectral norm .2·rate·√max(rows, columns), which must not grow with width (Yang, Simon & Bernstein 2023,
    arXiv 2310.17813).
    """

    kind: Literal["mup", "completep"]
    width: int
    """Of the base shape."""
    depth: int
    """Of the base shape."""
    head_dim: int
    """Of the base shape."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "head_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"transfer.{name} = {getattr(self, name)}: must be at least 1")

    def multipliers(self, shape: ModelShape) -> Multipliers:
        """Those of a shape; all 1 for the base."""
        m = shape.width / self.width
        deeper = shape.depth / self.depth if self.kind == "completep" else 1.0
        return Multipliers(
            adamw_lr=1 / m,
            muon_lr=m**-0.5,
            eps=1 / m,
            layer_eps=1 / (m * deeper),
            head_init=m**0.5,
            branch_init=deeper**0.5,
            logits=1 / m,
            scores=(self.head_dim / shape.dim_per_head) ** 0.5,
            branch=1 / deeper,
        )
