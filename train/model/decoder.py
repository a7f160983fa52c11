"""The pre-norm decoder: RMSNorm, RoPE, SwiGLU or experts, grouped-query attention, QK-norm, optional tied embeddings.

Modules and parameters are named as Hugging Face's Qwen3ForCausalLM names them.

Shape suffixes: B batch, T sequence, D width, F feed-forward, V vocabulary, H query heads, G key/value heads,
K size of one head.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from scaling.errors import InputError
from scaling.shape import ModelShape
from scaling.transfer import Multipliers
from train.model.attention import Context, Documents, Packing, attend
from train.model.cache import KVCache, LayerCache
from train.model.experts import SparseMLP, routers
from train.model.layers import MLP, Linear, RMSNorm
from train.model.loss import linear_cross_entropy
from train.model.precision import compute_dtype

UNSCALED = Multipliers()
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")
EMBEDDING_STD = 0.1
"""Initial standard deviation of the embedding; chosen by measurement (docs/log.md)."""


def rotary_tables(shape: ModelShape) -> tuple[Tensor, Tensor]:
    """cos and sin of position × frequency, each (seq_len, 1, head_dim), halves repeated (Su et al. 2021, 2104.09864)."""
    k = shape.dim_per_head
    frequency = shape.rope_theta ** (-torch.arange(0, k, 2, dtype=torch.float64) / k)
    angle_TK = torch.outer(torch.arange(shape.seq_len, dtype=torch.float64), frequency).repeat(1, 2)[:, None, :]
    return angle_TK.cos().float(), angle_TK.sin().float()


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + K/2]) by its position's angle."""
    first, second = x_BTHK.chunk(2, dim=-1)
    return x_BTHK * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and optional RMSNorm on each head's query and key."""

    def __init__(self, shape: ModelShape, multipliers: Multipliers = UNSCALED) -> None:
        super().__init__()
        self.head_dim, self.scale = shape.dim_per_head, multipliers.scores
        query, kv = shape.n_heads * self.head_dim, shape.kv_heads * self.head_dim
        self.q_proj = Linear(shape.width, query)
        self.k_proj = Linear(shape.width, kv)
        self.v_proj = Linear(shape.width, kv)
        self.o_proj = Linear(query, shape.width)
        self.q_norm = RMSNorm(self.head_dim) if shape.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if shape.qk_norm else nn.Identity()
        self.context: Context | None = None
        """The ranks that share each sequence."""

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTHK = rotate(self.q_norm(self.q_proj(x_BTD).view(heads)), cos, sin)
        k_BTGK = rotate(self.k_norm(self.k_proj(x_BTD).view(heads)), cos, sin)
        v_BTGK = self.v_proj(x_BTD).view(heads)
        if self.scale != 1.0:
            q_BTHK = q_BTHK * self.scale
        if cache is not None:
            k_BTGK, v_BTGK = cache.extend(k_BTGK, v_BTGK)
        return self.o_proj(attend(q_BTHK, k_BTGK, v_BTGK, self.context, documents).flatten(2))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with a transfer each addend times its branch multiplier."""

    def __init__(self, shape: ModelShape, multipliers: Multipliers = UNSCALED) -> None:
        super().__init__()
        self.branch = multipliers.branch
        self.input_layernorm = RMSNorm(shape.width)
        self.self_attn = Attention(shape, multipliers)
        self.post_attention_layernorm = RMSNorm(shape.width)
        self.mlp = SparseMLP(shape) if shape.experts else MLP(shape.width, shape.d_ff)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self._scaled(self.self_attn(self.input_layernorm(x_BTD), cos, sin, cache, documents))
        return x_BTD + self._scaled(self.mlp(self.post_attention_layernorm(x_BTD)))

    def _scaled(self, addend_BTD: Tensor) -> Tensor:
        return addend_BTD if self.branch == 1.0 else addend_BTD * self.branch


class Stack(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, shape: ModelShape, multipliers: Multipliers = UNSCALED) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.width)
        self.layers = nn.ModuleList(Layer(shape, multipliers) for _ in range(shape.depth))
        self.norm = RMSNorm(shape.width, multipliers.logits)


class Decoder(nn.Module):
    """Token ids to logits.

    Args:
        shape: the model.
        precision: fp32 | bf16 | fp8: what the matrix products and the residual stream compute in. Master weights, norms,
            softmax and loss are fp32 under all; fp8 is bf16 until `use_fp8` changes the layers.
        multipliers: of a run whose hyperparameters are another shape's.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: ModelShape, precision: str = "fp32", multipliers: Multipliers = UNSCALED) -> None:
        super().__init__()
        self.shape, self.multipliers = shape, multipliers
        self.dtype = compute_dtype(precision)
        self.model = Stack(shape, multipliers)
        self.lm_head = Linear(shape.width, shape.vocab_size)
        if shape.tied_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name in ("cos", "sin"):
            table_TK = torch.empty(shape.seq_len, 1, shape.dim_per_head, dtype=self.dtype)
            self.register_buffer(name, table_TK, persistent=False)
        self.packing: Packing | None = None
        """How attention stays within documents; None: it does not."""

    @classmethod
    def of_weights(cls, shape: ModelShape, weights: Mapping[str, Tensor], precision: str = "fp32") -> Decoder:
        """The model of these weights (a `state_dict`), which it takes without a copy, on their device."""
        with torch.device("meta"):
            model = cls(shape, precision)
        model.load_state_dict(weights, assign=True)
        if shape.tied_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        model.cos, model.sin = (t.to(model.lm_head.weight.device, model.dtype) for t in rotary_tables(shape))
        return model

    def hidden(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final-norm output (B, T, D) in the compute dtype, for ids (B, T): what the head reads.

        Args:
            cache: of the tokens before these, which it then holds too; T is 1 unless it is empty. None: there are none.
        Raises:
            InputError: together they are more than seq_len tokens, for which there are no rotary tables.
        """
        start = 0 if cache is None else cache.length
        positions = slice(start, start + tokens_BT.shape[1])
        if positions.stop > self.shape.seq_len:
            raise InputError(
                f"{positions.stop} tokens at once: this model's positions (RoPE) are built for {self.shape.seq_len}, the length "
                "that it was trained on: give fewer, or train with model.seq_len of that many"
            )
        cos, sin = self.cos[positions], self.sin[positions]
        caches = [None] * self.shape.depth if cache is None else cache.layers
        x_BTD = self.model.embed_tokens(tokens_BT).to(self.dtype)
        documents = None
        if self.packing is not None and cache is None:
            documents = self.packing.documents(tokens_BT)
        for layer, layer_cache in zip(self.model.layers, caches, strict=True):
            x_BTD = layer(x_BTD, cos, sin, layer_cache, documents)
        return self.model.norm(x_BTD)

    def make_room(self, tokens_BT: Tensor) -> None:
        """Before a batch: see that `packing` has room for its documents. The ids are still on the CPU."""
        if self.packing is not None:
            self.packing = self.packing.with_room(tokens_BT)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) in the compute dtype, for ids (B, T), T ≤ seq_len."""
        return self.lm_head(self.hidden(tokens_BT))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, z_loss: float = 0.0) -> Tensor:
        """Cross-entropy in nats, summed over the B·T tokens; its gradient includes the z-loss's and the experts'."""
        nll = linear_cross_entropy(self.hidden(tokens_BT), self.lm_head.weight, targets_BT, z_loss)
        if self.shape.experts and self.shape.experts.balance == "loss":
            for router in routers(self):
                assert router.auxiliary is not None
                nll = nll + (router.auxiliary - router.auxiliary.detach())
        return nll

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill the rotary tables and draw the initial weights: normal, σ = fan_in^-½ (residual outputs ÷ √(2·depth)); gains 1.

        Each tensor has its own generator, seeded by (seed, its name), so that the weights do not depend on the order
        of construction, nor on where the tensor lives. For a model built on the meta device this follows `to_empty`.
        """
        if self.shape.tied_embeddings:  # to_empty makes the two names two tensors
            self.lm_head.weight = self.model.embed_tokens.weight
        for buffer, table in zip((self.cos, self.sin), rotary_tables(self.shape), strict=True):
            buffer.copy_(table)
        for router in routers(self):
            router.bias_E.zero_()
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_weight(name, parameter.shape, self.shape, seed, self.multipliers))


def initial_weight(
    name: str, size: Sequence[int], shape: ModelShape, seed: int, multipliers: Multipliers = UNSCALED
) -> Tensor:
    """What `Decoder.initialise` fills the parameter of this name with, on the CPU."""
    if len(size) == 1:
        return torch.ones(size)
    std = EMBEDDING_STD if "embed_tokens" in name else size[1] ** -0.5
    if name == "lm_head.weight":
        std *= multipliers.head_init
    if name.endswith(RESIDUAL_OUTPUTS):
        std *= multipliers.branch_init / math.sqrt(2 * shape.depth)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(size, generator=generator) * std


def folded(weights: Mapping[str, Tensor], multipliers: Multipliers) -> dict[str, Tensor]:
    """Weights that give without multipliers what these give with them; without them the same tensors."""

    def factor(name: str) -> float:
        if name == "model.norm.weight":
            return multipliers.logits
        if name.endswith(RESIDUAL_OUTPUTS):
            return multipliers.branch
        reads = "q_norm.weight" if any("q_norm" in other for other in weights) else "q_proj.weight"
        return multipliers.scores if name.endswith(reads) else 1.0

    return {name: weight if factor(name) == 1.0 else weight * factor(name) for name, weight in weights.items()}
