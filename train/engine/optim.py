"""Optimizers and their parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from scaling.spec import OptimSpec


class Optimizers:
    """The optimizers of one run, stepped together: AdamW alone, or Muon on the layers' matrices and AdamW on the rest.

    Weight decay (decoupled) applies to the layers' matrices and the head, not to embeddings and norms; with tied
    embeddings the shared matrix has none.

    Muon (Jordan et al. 2024) orthogonalises the momentum of each matrix by Newton–Schulz; its update is scaled to
    AdamW's root mean square, .2·√max(rows, columns) (Liu et al. 2025, arXiv 2502.16982), so one peak_lr serves both.
    """

    def __init__(self, model: nn.Module, spec: OptimSpec) -> None:
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
            {"params": head + ([] if muon else layers), "weight_decay": decay, "lr_ratio": ratio},
            {"params": rest, "weight_decay": 0.0, "lr_ratio": ratio},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [g for g in groups if g["params"]],
                lr=spec.peak_lr,
                betas=(spec.beta1, spec.beta2),
                eps=spec.eps,
                fused=True,
            )
        ]
        if muon:
            self.optimizers.append(
                torch.optim.Muon(
                    [{"params": layers, "lr_ratio": 1.0}],
                    lr=spec.peak_lr,
                    weight_decay=decay,
                    momentum=spec.momentum,
                    nesterov=True,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def step(self, lr_factor: float) -> None:
        """One update at lr_factor × peak_lr; gradients are cleared."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.spec.peak_lr * group["lr_ratio"] * lr_factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        """The optimizers' states, in order."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        """The inverse of `state_dict`."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
