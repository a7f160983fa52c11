"""A sparse MLP: a router sends each token to top_k of n_experts SwiGLUs; shared experts see every token.

Shape suffixes: N tokens, D width, F hidden size of one expert, E experts, K = top_k.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from scaling.shape import ModelShape
from train.model.layers import MLP, Linear


class Router(nn.Module):
    """Chooses each token's experts and their weights, in fp32.

    balance=bias (DeepSeek-V3, arXiv 2412.19437, eqs. 12–16): affinity s = sigmoid(Wx); the top_k of s + b are chosen, b
    a bias of each expert that `follow_load` moves by balance_rate against its load. balance=loss (Fedus et al. 2021,
    arXiv 2101.03961, eqs. 4–6): s = softmax(Wx), the top_k of s, and the loss E·Σ f_e·P_e, f_e the share of choices that
    fell on expert e and P_e its mean s. Weights are s of the chosen, over their sum when top_k > 1.
    """

    bias_E: Tensor

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        assert shape.experts is not None
        self.experts = shape.experts
        self.proj = Linear(shape.width, shape.experts.n_experts)
        self.register_buffer("bias_E", torch.zeros(shape.experts.n_experts))
        self.load_E: Tensor | None = None
        """Tokens that each expert got since the last `follow_load`; recomputed layers count theirs again."""
        self.auxiliary: Tensor | None = None
        """balance=loss: balance_rate · N · E·Σ f·P of the last forward pass."""
        self.peers: ProcessGroup | None = None
        """Ranks that share each sequence: f is of all of its tokens."""

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chosen experts (N, K), their weights (N, K) in fp32, and the tokens that each expert got, (E,)."""
        experts = self.experts
        logits_NE = self.proj(x_ND.float())
        scores_NE = logits_NE.sigmoid() if experts.balance == "bias" else logits_NE.softmax(dim=1)
        ranked_NE = scores_NE.detach() + self.bias_E if experts.balance == "bias" else scores_NE.detach()
        chosen_NK = ranked_NE.topk(experts.top_k, dim=1, sorted=False).indices
        weights_NK = scores_NE.gather(1, chosen_NK)
        if experts.top_k > 1:
            weights_NK = weights_NK / weights_NK.sum(dim=1, keepdim=True)
        counts_E = own_E = torch.bincount(chosen_NK.flatten(), minlength=experts.n_experts)
        if self.training:
            self.load_E = own_E if self.load_E is None else self.load_E + own_E
        if experts.balance == "loss":
            if self.peers is not None:
                counts_E = counts_E.clone()
                dist.all_reduce(counts_E, group=self.peers)
            share_E = counts_E / counts_E.sum()
            scale = experts.balance_rate * len(x_ND) * experts.n_experts
            self.auxiliary = scale * (share_E * scores_NE.mean(dim=0)).sum()
        return chosen_NK, weights_NK, own_E

    @torch.no_grad()
    def follow_load(self) -> Tensor:
        """After an optimizer step: move the biases by balance_rate·sign(mean load − load); returns the load, which starts anew."""
        assert self.load_E is not None, "a step follows a forward pass"
        load_E, self.load_E = self.load_E.float(), None
        if self.experts.balance == "bias":
            self.bias_E += self.experts.balance_rate * torch.sign(load_E.mean() - load_E)
        return load_E


class SparseMLP(nn.Module):
    """Σ weight · expert(x) over the chosen experts, plus the shared ones.

    Choices are sorted by expert, so that each expert multiplies one block of rows; no token is dropped.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        assert shape.experts is not None
        self.router = Router(shape)
        self.experts = nn.ModuleList(MLP(shape.width, shape.expert_d_ff) for _ in range(shape.experts.n_experts))
        shared = shape.experts.n_shared * shape.expert_d_ff
        self.shared_experts = MLP(shape.width, shared) if shared else None
        self.aligned = shape.width % 8 == shape.expert_d_ff % 8 == 0
        """Whether rows are multiples of 16 bytes in bf16, which the grouped kernel wants."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        chosen_NK, weights_NK, counts_E = self.router(x_ND)
        order = chosen_NK.flatten().argsort(stable=True)
        rows = x_ND.repeat_interleave(chosen_NK.shape[1], dim=0)[order]
        if rows.device.type == "cuda" and rows.dtype == torch.bfloat16 and self.aligned:
            out = self._grouped(rows, counts_E)
        else:
            parts = rows.split(counts_E.tolist())
            out = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        out_NKD = out[inverse].view(*chosen_NK.shape, -1)
        out_ND = (out_NKD * weights_NK.to(out.dtype)[:, :, None]).sum(dim=1)
        if self.shared_experts is not None:
            out_ND = out_ND + self.shared_experts(x_ND)
        return out_ND.view_as(x_BTD)

    def _grouped(self, rows: Tensor, counts_E: Tensor) -> Tensor:
        """All experts in three grouped products, without a host sync: rows in bf16, sorted by expert."""
        ends_E = counts_E.cumsum(0).to(torch.int32)

        def product(x: Tensor, name: str) -> Tensor:
            weights_EOI = torch.stack([getattr(expert, name).weight.to(x.dtype) for expert in self.experts])
            return torch._grouped_mm(x, weights_EOI.mT, offs=ends_E)

        return product(F.silu(product(rows, "gate_proj")) * product(rows, "up_proj"), "down_proj")


def routers(model: nn.Module) -> Iterator[Router]:
    """The routers of a model, layer by layer."""
    return (module for module in model.modules() if isinstance(module, Router))


def follow_load(model: nn.Module) -> dict[str, float]:
    """Balance every router after an optimizer step; how even the step's load was (`evenness`), nothing for a dense model."""
    loads = [router.follow_load() for router in routers(model)]
    return evenness(torch.stack(loads)) if loads else {}


def evenness(load_LE: Tensor) -> dict[str, float]:
    """How even a step's load was, for metrics.jsonl.

    Returns:
        expert_load_max: the fullest expert's load over the mean, in the layer where that is worst; experts_unused: those
        that no token went to, over all layers.
    """
    worst, unused = torch.stack([(load_LE.amax(1) / load_LE.mean(1)).amax(), (load_LE == 0).sum()]).tolist()
    return {"expert_load_max": worst, "experts_unused": unused}
