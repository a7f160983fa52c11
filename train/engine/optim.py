"""Optimizers and their parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from scaling.spec import OptimSpec
from train.engine.muon import Muon
from train.model.precision import compute_dtype


class Optimizers:
    """The optimizers of one run, stepped together: AdamW alone, or Muon on the layers' matrices and AdamW on the rest.

    Weight decay (decoupled) applies to the layers' matrices and the head, not to embeddings and norms; with tied
    embeddings the shared matrix has none.

    Muon (Jordan et al. 2024) orthogonalises the momentum of each matrix by Newton–Schulz; its update is scaled to
    AdamW's root mean square, .2·√max(rows, columns) (Liu et al. 2025, arXiv 2502.16982), so one peak_lr serves both.
    """

    def __init__(self, model: nn.Module, spec: OptimSpec, precision: str) -> None:
        self.spec = spec
        layers, head, rest = [], [], []
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                layers.append(parameter)
            elif name == "lm_head.weight":
                head.append(parameter)
            else:
                rest.append(parameter)
        muon = spec.name == "muon"
        decay, ratio = spec.weight_decay, spec.adamw_lr_ratio if muon else 1.0
        groups = [
            {"params": head + ([] if muon else layers), "weight_decay": decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        self.adamw_ratio = ratio
        self.adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=spec.peak_lr,
            betas=(spec.beta1, spec.beta2),
            eps=spec.eps,
            fused=True,
        )
        self.muon = Muon(layers, spec.momentum, decay, compute_dtype(precision)) if muon else None

    def step(self, lr_factor: float) -> None:
        """One update at lr_factor × peak_lr; gradients are cleared."""
        lr = self.spec.peak_lr * lr_factor
        for group in self.adamw.param_groups:
            group["lr"] = lr * self.adamw_ratio
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        if self.muon is not None:
            self.muon.step(lr)

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' states."""
        return {"adamw": self.adamw.state_dict(), "muon": None if self.muon is None else self.muon.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.adamw.load_state_dict(state["adamw"])
        if self.muon is not None:
            self.muon.load_state_dict(state["muon"])
