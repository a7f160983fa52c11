"""One pipeline stage of the decoder on its ranks: tensor and sequence parallel, context parallel, fully sharded.

Shape suffixes: B batch, T this rank's positions of a sequence (before the layers and between them: its part of those),
D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from scaling.spec import RunSpec
from train.data.tokenizer import EOS
from train.engine.parallel.mesh import Mesh
from train.engine.parallel.shards import local_part, own_part, split_over_tensor
from train.model.attention import Packing
from train.model.collectives import gather_sequence, local, scatter_sequence
from train.model.decoder import Decoder, initial_weight, rotary_tables
from train.model.experts import routers
from train.model.kernels import recomputed
from train.model.loss import linear_cross_entropy


class Stage(nn.Module):
    """Layers `first` to `stop` − 1 of a run's decoder, with the embedding on the first stage, norm and loss on the last.

    Between tensor-parallel ranks the residual stream is split along the sequence (Korthikanti et al. 2022, arXiv
    2205.05198): gathered before attention and MLP, summed and scattered after; the loss is over vocabulary parts.
    Parameters have the decoder's names.
    """

    def __init__(self, spec: RunSpec, mesh: Mesh, first: int, stop: int) -> None:
        super().__init__()
        self.mesh, self.spec = mesh, spec
        self.is_first, self.is_last = first == 0, stop == spec.shape.depth
        self.numbers = slice(first, stop)
        with torch.device("meta"):
            decoder = Decoder(spec.shape, spec.precision, spec.multipliers)
        decoder.model.layers = nn.ModuleDict({str(n): decoder.model.layers[n] for n in range(first, stop)})  # type: ignore[assignment]
        if not self.is_first:
            del decoder.model.embed_tokens
        if not self.is_last:
            del decoder.model.norm, decoder.lm_head
        if spec.data.document_mask:
            of = decoder.dtype, spec.shape.dim_per_head, EOS, mesh.context is not None
            decoder.packing = Packing.on(mesh.device, *of)
        self.decoder = decoder
        self.nll: Tensor = torch.zeros((), device=mesh.device)
        """Summed loss of the micro-batches since it was set to 0."""
        split_over_tensor(decoder, mesh)
        for router in routers(decoder):
            router.peers = None if mesh.context is None else mesh.context.group
        for layer in self.layers:
            layer.self_attn.context = mesh.context
            if mesh.tensor is not None:
                for part in (layer.self_attn, layer.mlp):
                    part.register_forward_pre_hook(self._before)
                    part.register_forward_hook(self._after)
            if mesh.layout.recompute != "none":
                layer.forward = recomputed(layer.forward, mesh.layout.recompute)
        # zero bubble computes weight gradients apart: torch 2.13 loses those of weights that were given back before
        keep = mesh.layout.shard == "optimizer" or mesh.layout.schedule == "zero_bubble"
        for module in (*self.layers, self):
            fully_shard(module, mesh=mesh.fully_shard, reshard_after_forward=not keep)
        for module in self.sharded():
            module.set_gradient_divide_factor(1.0)  # the loss is over the global batch: gradients add up
            module.set_force_sum_reduction_for_comms(True)
        self.to_empty(device=mesh.device)
        self._fill()

    @property
    def layers(self) -> list[Any]:
        """This stage's layers."""
        layers = self.decoder.model.layers
        assert isinstance(layers, nn.ModuleDict)
        return list(layers.values())

    def sharded(self) -> list[FSDPModule]:
        """The modules whose parameters are gathered together."""
        return [module for module in self.modules() if isinstance(module, FSDPModule)]

    @torch.no_grad()
    def _fill(self) -> None:
        """Rotary tables; and of each full initial tensor, drawn as one process draws it, this rank's part."""
        if self.spec.shape.tied_embeddings:  # to_empty makes the two names two tensors
            self.decoder.lm_head.weight = self.decoder.model.embed_tokens.weight
        positions = self.mesh.positions(self.spec.shape.seq_len)
        for name, table in zip(("cos", "sin"), rotary_tables(self.spec.shape), strict=True):
            setattr(self.decoder, name, table[positions].to(self.mesh.device, self.decoder.dtype))
        for router in routers(self.decoder):
            router.bias_E.zero_()
        for name, parameter in self.decoder.named_parameters():
            full = initial_weight(name, parameter.shape, self.spec.shape, self.spec.seed, self.spec.multipliers)
            local_part(parameter).copy_(own_part(name, full, self.mesh))

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert self.mesh.tensor is not None
        return gather_sequence(args[0], self.mesh.tensor), *args[1:]

    def _after(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        assert self.mesh.tensor is not None
        return scatter_sequence(out, self.mesh.tensor)

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        """Rows of the embedding; of those that another rank holds, 0, and the sum is scattered along the sequence."""
        weight = local(self.decoder.model.embed_tokens.weight)
        if self.mesh.tensor is None:
            return F.embedding(tokens_BT, weight)
        ids = tokens_BT - self.mesh.tensor_rank * weight.shape[0]
        is_here = (ids >= 0) & (ids < weight.shape[0])
        rows = F.embedding(ids.clamp(0, weight.shape[0] - 1), weight) * is_here[..., None]
        return scatter_sequence(rows, self.mesh.tensor)

    def forward(self, x: Tensor, targets_BT: Tensor | None = None, tokens_BS: Tensor | None = None) -> Tensor:
        """Ids (B, T) on the first stage, else (B, T, D) from the stage before; the last stage's summed loss, (1,).

        Args:
            tokens_BS: all ids of the sequences, where attention stays within documents.
        """
        documents = None
        if tokens_BS is not None:
            assert self.decoder.packing is not None
            documents = self.decoder.packing.documents(tokens_BS, self.mesh.positions(self.spec.shape.seq_len))
        if self.is_first:
            x = self._embed(x).to(self.decoder.dtype)
        for layer in self.layers:
            x = layer(x, self.decoder.cos, self.decoder.sin, None, documents)
        if not self.is_last:
            return x
        assert targets_BT is not None
        x = self.decoder.model.norm(x)
        if self.mesh.tensor is not None:
            x = gather_sequence(x, self.mesh.tensor)
        head = local(self.decoder.lm_head.weight)
        nll = linear_cross_entropy(x, head, targets_BT, self.spec.optim.z_loss, self.mesh.tensor)
        self.nll += nll.detach()
        if self.spec.shape.experts and self.spec.shape.experts.balance == "loss":
            for router in routers(self.decoder):
                assert router.auxiliary is not None
                share = router.auxiliary / self.mesh.layout.tensor  # each tensor-parallel rank has seen all tokens
                nll = nll + (share - share.detach())
        return nll.repeat(1)
