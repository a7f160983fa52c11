"""Parameters by group, FLOPs per token by term, bytes: every count that a scaling-law convention uses.

Matrix multiplications only, 2 FLOPs a multiply-add, as in Kaplan et al. 2020 (arXiv 2001.08361, table 1) and
Hoffmann et al. 2022 (arXiv 2203.15556, appendix F); element-wise work, norms and softmax are not counted.
Backward costs twice forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scaling.errors import unknown
from scaling.shape import ModelShape

ParamsConvention = Literal["total", "non_embedding", "body_head"]
FlopsConvention = Literal["exact", "full_attention", "6nd"]
PARAMS_CONVENTIONS: tuple[ParamsConvention, ...] = ("total", "non_embedding", "body_head")
FLOPS_CONVENTIONS: tuple[FlopsConvention, ...] = ("exact", "full_attention", "6nd")


@dataclass(frozen=True)
class ParamCount:
    """Parameters by group. The groups sum to `total`."""

    embedding: int
    """Input embedding: vocab_size × width."""
    head: int
    """Output head: vocab_size × width, or 0 when it shares the embedding's matrix."""
    attention: int
    """Query, key, value and output projections of all layers."""
    mlp: int
    """The three SwiGLU matrices of all layers, of all experts where there are experts."""
    norms: int
    """RMSNorm gains, QK-norm's included."""
    tied: bool
    """Whether head and embedding are one matrix."""
    router: int = 0
    """The routers of all layers: n_experts × width each."""
    idle: int = 0
    """Of `mlp`: the experts that a token does not meet."""

    @property
    def total(self) -> int:
        """Every trainable number, each once."""
        return self.embedding + self.head + self.attention + self.mlp + self.router + self.norms

    @property
    def non_embedding(self) -> int:
        """Kaplan's N: neither embedding nor head."""
        return self.attention + self.mlp + self.router + self.norms

    @property
    def body_head(self) -> int:
        """Layers and output head: the parameters that multiply each token (the head counts when tied too)."""
        return self.non_embedding + (self.embedding if self.tied else self.head)

    @property
    def groups(self) -> dict[str, int]:
        """The groups by name; the router's only where there is one."""
        names = ("embedding", "head", "attention", "mlp", *(("router",) if self.router else ()), "norms")
        return {name: getattr(self, name) for name in names}

    def count(self, convention: ParamsConvention) -> int:
        """N under a convention: total | non_embedding | body_head. All experts count."""
        if convention not in PARAMS_CONVENTIONS:
            raise unknown("parameter convention", convention, PARAMS_CONVENTIONS)
        return int(getattr(self, convention))

    def active(self, convention: ParamsConvention) -> int:
        """N under a convention without the experts that a token does not meet."""
        return self.count(convention) - self.idle


def count_params(shape: ModelShape) -> ParamCount:
    """Parameters of a shape by group."""
    w, layers, hd = shape.width, shape.depth, shape.dim_per_head
    query, kv = shape.n_heads * hd, shape.kv_heads * hd
    embedding = shape.vocab_size * w
    experts, expert = shape.experts, 3 * w * shape.expert_d_ff
    held = experts.n_experts + experts.n_shared if experts else 1
    return ParamCount(
        embedding=embedding,
        head=0 if shape.tied_embeddings else embedding,
        attention=layers * (2 * w * query + 2 * w * kv),
        mlp=layers * held * expert,
        norms=layers * (2 * w + (2 * hd if shape.qk_norm else 0)) + w,
        tied=shape.tied_embeddings,
        router=layers * experts.n_experts * w if experts else 0,
        idle=layers * (experts.n_experts - experts.top_k) * expert if experts else 0,
    )


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward FLOPs of one training token by term, averaged over the sequence. The terms sum to `forward`."""

    attention_projections: float
    """2 × attention parameters."""
    attention_scores: float
    """QKᵀ and the weighted sum of V: 4·n_heads·head_dim × mean context length."""
    mlp: float
    """2 × MLP parameters; with experts, those that a token meets."""
    head: float
    """2 × vocab_size × width."""
    router: float = 0.0
    """2 × n_experts × width a layer."""

    @property
    def forward(self) -> float:
        """One token, forward."""
        return self.attention_projections + self.attention_scores + self.mlp + self.router + self.head

    @property
    def train(self) -> float:
        """One token, forward and backward: three times forward."""
        return 3 * self.forward


def flops_per_token(shape: ModelShape, causal: bool = True) -> FlopsPerToken:
    """FLOPs of one token by term.

    Args:
        shape: the model.
        causal: True (exact): a token attends to (seq_len + 1)/2 positions on average; False: to all seq_len, as
            PaLM's MFU convention and torch's FlopCounterMode count.
    """
    params = count_params(shape)
    context = (shape.seq_len + 1) / 2 if causal else float(shape.seq_len)
    return FlopsPerToken(
        attention_projections=2.0 * params.attention,
        attention_scores=4.0 * shape.depth * shape.n_heads * shape.dim_per_head * context,
        mlp=2.0 * (params.mlp - params.idle),
        router=2.0 * params.router,
        head=2.0 * shape.vocab_size * shape.width,
    )


def recomputed_flops(shape: ModelShape, recompute: str, layers: int | None = None) -> float:
    """FLOPs that the backward pass of one token computes again (a layer's last product, down, never is).

    full: the layers; selective: attention's key and output and the MLP's up projections.

    Args:
        layers: how many are recomputed; None: all.
    """
    per_token = flops_per_token(shape)
    share = 1.0 if layers is None else layers / shape.depth
    if recompute == "none":
        return 0.0
    if recompute == "selective":
        return share * (per_token.attention_projections / 2 + per_token.mlp / 3)
    projections = per_token.attention_projections + per_token.router + per_token.mlp * 2 / 3
    return share * (projections + per_token.attention_scores)


def training_flops(
    shape: ModelShape,
    tokens: float,
    convention: FlopsConvention = "exact",
    params: ParamsConvention = "body_head",
) -> float:
    """C, the FLOPs of training on `tokens`, forward and backward.

    Args:
        convention: "exact": causal attention; "full_attention": attention not halved; "6nd": 6·N·D, N what a token meets.
        params: which N the 6nd convention uses.
    """
    if convention == "exact":
        return flops_per_token(shape).train * tokens
    if convention == "full_attention":
        return flops_per_token(shape, causal=False).train * tokens
    if convention == "6nd":
        return 6.0 * count_params(shape).active(params) * tokens
    raise unknown("FLOPs convention", convention, FLOPS_CONVENTIONS)


@dataclass(frozen=True)
class TrainingBytes:
    """Memory of a training step of one process or of one of some shards, not compiled (bench/memory.py measures it)."""

    weights: int
    """fp32 master weights."""
    optimizer: int
    """AdamW: two fp32 moments; Muon: one on the layers' matrices, AdamW's two on the rest."""
    gradients: int
    """fp32 gradients."""
    update: int
    """Muon: the stacked gradients and products of the MLPs' matrices, while they step; attention's gradients are gone."""
    activations: int
    """What the forward pass of one micro-batch keeps for the backward pass, with the low-precision copies of the weights."""
    working: int
    """One layer's backward pass, with what it computes again; or gathering embedding and head where that takes more."""
    accumulates: bool = False
    """Whether gradients of earlier micro-batches are there already while a micro-batch is at work."""
    gathered: int = 0
    """Sharded: whole weights of embedding and head, of the layer at work and of the one that is fetched ahead; where the
    layer is computed again, its gradients, which are whole until its backward pass ends."""
    reduced: int = 0
    """Sharded: the gradients of embedding and head while they are summed over the ranks."""

    @property
    def total(self) -> int:
        """The peak: activations go while gradients come, so it lies at the start of the backward pass or at the update."""
        held = self.gradients if self.accumulates else 0
        at_work = held + self.activations + self.working + self.gathered
        return self.weights + self.optimizer + max(at_work, self.gradients + max(self.update, self.reduced))


def training_bytes(
    shape: ModelShape,
    micro_batch_tokens: int,
    optimizer: str = "adamw",
    precision: str = "fp32",
    recompute: str = "none",
    accumulates: bool = False,
    layers: int | None = None,
    shards: int = 1,
    document_mask: bool = False,
) -> TrainingBytes:
    """Bytes of a training step by part, of eager operators without an allocator's rounding.

    A norm keeps its input and the normalised values (fp32) and its output; attention q, k, v, its output and the sums of
    its softmax; the MLP gate, silu, up and their product; an expert's rows three times besides. After the layers: the
    final norm's input and normalised values, and the gradients of the head's input and weight, which the loss computes
    in its forward pass. Of a mask of documents each layer keeps its own copy, in what it computes in; recomputation keeps the
    one of a byte a pair of positions, for all layers.

    Args:
        recompute: none | selective | full, as train.run's.
        accumulates: whether a step has several micro-batches.
        layers: how many are recomputed, from the first one on; None: all. The backward pass comes to them last, when the
            others' values are gone, so that what it computes again for them is no peak unless all are recomputed.
        shards: ranks that share weights, gradients and optimizer states (FSDP), a layer gathered at a time, into a buffer
            and out of it; the tokens are those of one.
        document_mask: whether attention is given a mask of documents.
    """
    p = count_params(shape)
    value = 4 if precision == "fp32" else 2
    w, hd = shape.width, shape.dim_per_head
    query, kv = shape.n_heads * hd, shape.kv_heads * hd
    experts = shape.experts
    hidden = shape.expert_d_ff * (experts.top_k + experts.n_shared if experts else 1)
    per_head = 4 * (2 * shape.n_heads + shape.kv_heads) if shape.qk_norm else 4 * shape.n_heads
    normed = 2 * w + (query + kv if shape.qk_norm else 0)
    outputs = 2 * w + 2 * query + 2 * kv + 4 * hidden + (3 * experts.top_k * w if experts else 0)
    pairs = shape.seq_len if document_mask else 0
    layer = 8 * normed + value * (outputs + pairs) + per_head
    kept = {
        "none": layer,
        "selective": value * (2 * w + 2 * query + kv + hidden) + 4 * shape.n_heads,
        "full": value * w,
    }[recompute]
    matrices = p.attention + p.mlp + p.router
    copies = 0 if precision == "fp32" else 2 * matrices
    recomputed = 0 if recompute == "none" else shape.depth if layers is None else layers
    of_one = copies // shape.depth if recomputed == shape.depth else 0
    again = layer - kept + (value * w if recompute == "selective" else 0) if recomputed == shape.depth else 0
    head = shape.vocab_size * w
    # bytes of a matrix's number while its group steps, measured; sharded, the gradients of a layer are one tensor
    stacked = {"fp32": 17.5}.get(precision, 14.5) if shards == 1 else {"fp32": 19.0}.get(precision, 18.0)
    freed = 4 * p.attention if shards == 1 else 0
    working = micro_batch_tokens * (4 * (w + hidden) + again) + of_one
    ends, of_layer = 4 * (p.embedding + p.head), 4 * (p.non_embedding // shape.depth)
    if shards > 1:
        working = max(working, ends - 2 * of_layer)
    return TrainingBytes(
        weights=4 * p.total // shards,
        optimizer=4 * (2 * p.total - (matrices if optimizer == "muon" else 0)) // shards,
        gradients=4 * p.total // shards,
        update=max(0, round(stacked * p.mlp / shards) - freed) if optimizer == "muon" else 0,
        activations=micro_batch_tokens
        * (recomputed * kept + (shape.depth - recomputed) * layer + (8 + value) * w + (pairs if recomputed else 0))
        + 4 * head
        + copies * (shape.depth - recomputed) // shape.depth,
        working=working,
        accumulates=accumulates,
        gathered=ends + (3 if recompute == "full" else 2) * of_layer if shards > 1 else 0,
        reduced=2 * ends + 4 * head if shards > 1 else 0,
    )
