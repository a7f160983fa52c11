"""The decoder: its counts, its FLOPs, its initial weights, its loss and their gradients."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from scaling.accounting import count_params, flops_per_token, training_flops
from scaling.config import identity_dict
from scaling.errors import InputError
from scaling.shape import ModelShape, ShapeFamily
from scaling.spec import DataSpec
from train.model.attention import Packing
from train.model.decoder import Decoder
from train.model.loss import linear_cross_entropy

BASE = ModelShape(width=32, depth=2, n_heads=4, d_ff=88, vocab_size=96, seq_len=16)
SHAPES = [
    dataclasses.replace(BASE, **change)
    for change in (
        *({"width": w} for w in (16, 48, 64)),
        *({"depth": d} for d in (1, 3, 5)),
        *({"n_heads": h} for h in (1, 2, 8)),
        *({"n_kv_heads": k} for k in (1, 2)),
        *({"d_ff": f} for f in (32, 100)),
        *({"vocab_size": v} for v in (50, 257)),
        *({"seq_len": t} for t in (8, 33)),
        {"head_dim": 6},
        {"head_dim": 16, "n_kv_heads": 2},
        {"tied_embeddings": True},
        {"qk_norm": False},
        {"tied_embeddings": True, "qk_norm": False, "n_kv_heads": 1},
        {"width": 96, "n_heads": 6, "depth": 4, "vocab_size": 512},
    )
]


def test_there_are_at_least_twenty_shapes() -> None:
    assert len(set(SHAPES)) >= 20


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parameter_groups_are_the_models(shape: ModelShape) -> None:
    with torch.device("meta"):
        model = Decoder(shape)
    groups = {"embedding": 0, "head": 0, "attention": 0, "mlp": 0, "norms": 0}
    for name, parameter in model.named_parameters():  # a tied matrix comes once, as the embedding
        group = (
            "norms"
            if "norm" in name
            else "embedding"
            if "embed" in name
            else "head"
            if "lm_head" in name
            else "attention"
            if "self_attn" in name
            else "mlp"
        )
        groups[group] += parameter.numel()
    counted = count_params(shape)
    assert {name: getattr(counted, name) for name in groups} == groups
    assert counted.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flops_are_those_that_torch_records(shape: ModelShape) -> None:
    with torch.device("meta"):
        model = Decoder(shape)
        tokens = torch.zeros(3, shape.seq_len, dtype=torch.long)
        with FlopCounterMode(display=False) as forward:
            logits = model(tokens)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    per_token = flops_per_token(shape, causal=False)  # the counter does not halve causal attention
    assert forward.get_total_flops() == per_token.forward * tokens.numel()
    assert backward.get_total_flops() == 2 * per_token.forward * tokens.numel()
    assert per_token.train == 3 * per_token.forward


def test_causal_attention_counts_each_position_once() -> None:
    pairs = sum(range(1, BASE.seq_len + 1))  # query t reads t positions
    per_sequence = 4 * BASE.depth * BASE.n_heads * BASE.dim_per_head * pairs
    assert flops_per_token(BASE).attention_scores * BASE.seq_len == per_sequence


def test_conventions_of_training_flops() -> None:
    n = count_params(BASE)
    assert n.non_embedding < n.body_head < n.total
    assert training_flops(BASE, 10, "6nd") == 60 * n.body_head
    assert training_flops(BASE, 10, "6nd", "total") == 60 * n.total
    assert training_flops(BASE, 10) < training_flops(BASE, 10, "full_attention")
    with pytest.raises(InputError, match=r"unknown FLOPs convention '6n'.*exact, full_attention"):
        training_flops(BASE, 10, "6n")  # type: ignore[arg-type]


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_chunked_cross_entropy_is_the_plain_one(z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.model.loss.CHUNK_VALUES", 7 * 50)  # chunks that do not divide the batch
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 9, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 50, (3, 9), generator=generator)
    loss = linear_cross_entropy(hidden, weight, targets, z_loss)
    loss.backward()
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = (hidden @ weight.T).flatten(0, 1)
    plain = F.cross_entropy(logits, targets.flatten(), reduction="sum")
    (plain + z_loss * logits.logsumexp(1).square().sum()).backward()
    torch.testing.assert_close(loss.detach(), plain.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(grads, (hidden.grad, weight.grad), rtol=1e-4, atol=1e-5)


def test_loss_without_gradient_is_the_same() -> None:
    model = Decoder(BASE)
    model.initialise(0)
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        loss = float(model.loss(tokens, tokens))
    assert loss == pytest.approx(float(model.loss(tokens, tokens).detach()), rel=1e-6)


def test_no_position_sees_a_later_one() -> None:
    model = Decoder(BASE)
    model.initialise(1)
    tokens = torch.randint(0, BASE.vocab_size, (1, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 10:] = 3
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :10], model(changed)[:, :10])
        assert not torch.allclose(model(tokens)[:, 10:], model(changed)[:, 10:])


def test_order_of_the_tokens_matters() -> None:
    """Without positions the last logits would not notice a swap of two earlier tokens in one layer."""
    model = Decoder(dataclasses.replace(BASE, depth=1))
    model.initialise(1)
    with torch.no_grad():
        last = model(torch.tensor([[1, 2, 3, 4]]))[0, -1]
        swapped = model(torch.tensor([[2, 1, 3, 4]]))[0, -1]
    assert not torch.allclose(last, swapped, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_depend_on_seed_and_name_alone(tied: bool) -> None:
    shape = dataclasses.replace(BASE, tied_embeddings=tied)
    direct = Decoder(shape)
    direct.initialise(3)
    with torch.device("meta"):
        empty = Decoder(shape)
    late = empty.to_empty(device="cpu")
    late.initialise(3)
    torch.testing.assert_close(late.state_dict(), direct.state_dict(), rtol=0, atol=0)
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(late(tokens), direct(tokens), rtol=0, atol=0)
    assert (late.lm_head.weight is late.model.embed_tokens.weight) is tied
    direct.initialise(4)
    assert not torch.equal(direct.lm_head.weight, late.lm_head.weight)


def test_bf16_keeps_fp32_master_weights_and_a_close_loss() -> None:
    tokens = torch.arange(32).view(2, 16)
    losses = {}
    for precision in ("fp32", "bf16"):
        model = Decoder(BASE, precision)
        model.initialise(0)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        loss = model.loss(tokens, tokens)
        loss.backward()
        assert model.lm_head.weight.grad is not None
        assert model.lm_head.weight.grad.dtype == torch.float32
        losses[precision] = float(loss.detach())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 30}, r"width 30 is not divisible by 4 heads: use n_heads in \[1, 3, 5, 15\]"),
        ({"width": 12}, "head_dim 3 .* is odd"),
        ({"n_kv_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3"),
        ({"depth": 0}, "shape.depth = 0: must be at least 1"),
    ],
)
def test_shapes_that_cannot_be(change: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(BASE, **change)


def test_family_has_no_jumps() -> None:
    family = ShapeFamily(vocab_size=512, seq_len=128, depth=4, n_heads=4)
    counts = [count_params(family.shape(w)).body_head for w in range(16, 97, 8)]
    assert all(small < large < 2.2 * small for small, large in pairwise(counts))
    with pytest.raises(InputError, match="exactly one of depth"):
        dataclasses.replace(family, aspect_ratio=16.0)


def test_with_a_document_mask_a_packed_document_is_read_as_if_alone() -> None:
    model = Decoder(dataclasses.replace(BASE, n_kv_heads=2))
    model.initialise(1)
    end = 7
    first, second = torch.tensor([[1, 2, 3, 4, end]]), torch.tensor([[5, 6, 8, 9, end, 10, 11]])
    packed = torch.cat((first, second), dim=1)
    with torch.no_grad():
        crossing = model(packed)
        model.packing = Packing(end)
        masked = model(packed)
        torch.testing.assert_close(masked[:, :5], model(first))
        torch.testing.assert_close(masked[:, :5], crossing[:, :5])  # the first document sees what it saw
        assert not torch.allclose(masked[:, 5:], crossing[:, 5:], atol=1e-4)
        alone = model(second)  # at other positions: rotations are relative
        torch.testing.assert_close(masked[:, 5:], alone, rtol=1e-4, atol=1e-4)
        other = packed.clone()
        other[:, 5:10] = 12  # the second document's own beginning
        other[:, 9] = end
        torch.testing.assert_close(model(other)[:, 10:], masked[:, 10:])


def test_a_document_mask_is_part_of_what_a_run_is() -> None:
    assert "document_mask" not in identity_dict(DataSpec("site"))
    assert identity_dict(DataSpec("site", document_mask=True))["document_mask"] is True
