"""Attention within documents, by a mask or by their borders; which kernels compute it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scaling.accounting import training_bytes
from scaling.errors import InputError
from scaling.launch import LocalLauncher
from scaling.memory import Settings
from scaling.shape import ModelShape
from scaling.spec import RunSpec
from train.data.loader import Corpus
from train.data.tokenizer import EOS
from train.engine.graphs import CapturedPass
from train.engine.host import Host
from train.engine.memory import settings
from train.engine.stacked import StackedDecoder
from train.engine.trainer import Trainer
from train.model.attention import (
    Context,
    Documents,
    Packing,
    attend,
    document_borders,
    document_mask,
    takes_varlen,
    varlen_found,
)
from train.model.decoder import Decoder
from train.model.kernels import BEST, FLASH, choose_attention, importable, set_up, use_attention

Specs = Callable[..., RunSpec]
END = 0
SHAPE = ModelShape(width=32, depth=3, n_heads=4, n_kv_heads=2, d_ff=88, vocab_size=96, seq_len=16)
BATCHES = {
    "none ends": [[1, 2, 3, 4], [1, 2, 3, 4]],
    "the first position ends one": [[END, 2, 3, 4], [1, 2, END, 4]],
    "the last position ends one": [[1, 2, 3, END], [1, END, 3, END]],
    "a row is one document": [[1, 2, END, 4], [1, 2, 3, END], [1, 2, 3, 4]],
    "each token is one": [[END, END, END, END], [END, END, END, END]],
}


def segments(borders_N: Tensor) -> Iterator[slice]:
    """Of the B·T tokens: those of each document."""
    borders = borders_N.tolist()
    return (slice(first, stop) for first, stop in itertools.pairwise(borders) if first < stop)


def mask_of(borders_N: Tensor, rows: int, seq_len: int) -> Tensor:
    """The mask of these documents, (B, 1, T, T)."""
    whole = torch.zeros(rows * seq_len, rows * seq_len, dtype=torch.bool)
    for part in segments(borders_N):
        whole[part, part] = True
    of_rows = whole.tril().view(rows, seq_len, rows, seq_len)
    assert not any(of_rows[i, :, j].any() for i in range(rows) for j in range(rows) if i != j)
    return torch.stack([of_rows[row, :, row] for row in range(rows)])[:, None]


@pytest.mark.parametrize("name", BATCHES)
def test_borders_are_those_of_the_mask(name: str) -> None:
    tokens = torch.tensor(BATCHES[name])
    borders = document_borders(tokens, END, 4)
    assert borders.dtype == torch.int32
    assert borders.shape == (len(tokens) * 4 + 1,)
    assert torch.equal(mask_of(borders, *tokens.shape), document_mask(tokens, END))


@given(st.integers(1, 4), st.integers(1, 12), st.data())
def test_borders_of_any_batch_are_those_of_the_mask(rows: int, seq_len: int, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, 2), min_size=rows * seq_len, max_size=rows * seq_len))
    tokens = torch.tensor(ids).view(rows, seq_len)
    packing = Packing(END, varlen=True).with_room(tokens)
    borders = packing.documents(tokens).borders_N
    assert borders is not None
    assert packing.room is not None
    assert len(borders) == rows * packing.room + 1
    assert torch.equal(mask_of(borders, rows, seq_len), document_mask(tokens, END))
    everything = Packing(END, varlen=True).documents(tokens).borders_N
    assert everything is not None
    assert list(segments(everything)) == list(segments(borders))


def test_room_grows_seldom_and_too_little_is_an_error() -> None:
    rows = torch.ones(3, 64, dtype=torch.long)
    rows[1, [5, 9, 20, 63]] = END
    packing = Packing(END, varlen=True).with_room(rows)
    assert packing.room == 4  # the last position's end begins no document
    assert packing.with_room(rows) is packing
    rows[1, 40] = END
    assert packing.with_room(rows).room == 8
    assert Packing(END, varlen=True).with_room(torch.zeros_like(rows)).room == 64
    mask_alone = Packing(END)
    assert mask_alone.with_room(rows) is mask_alone
    with pytest.raises(RuntimeError, match=r"more documents than Packing\.room"):
        Packing(END, varlen=True, room=4).documents(torch.zeros_like(rows))


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("groups", [4, 2])
def test_attention_document_by_document_is_attention_with_the_mask(name: str, groups: int) -> None:
    tokens = torch.tensor(BATCHES[name])
    generator = torch.Generator().manual_seed(0)
    shapes = ((*tokens.shape, heads, 8) for heads in (4, groups, groups))
    qkv = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    weights = torch.randn(*tokens.shape, 4, 8, generator=generator, dtype=torch.float64)

    def with_gradients(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad((out * weights).sum(), qkv)]

    masked = attend(*qkv, None, Packing(END).documents(tokens))
    parts = []
    for part in segments(document_borders(tokens, END, 4)):
        q, k, v = (x.flatten(0, 1)[part].transpose(0, 1)[None] for x in qkv)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    torch.testing.assert_close(
        with_gradients(masked), with_gradients(torch.cat(parts).view_as(masked)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "in_context", "takes"),
    [
        ((9, 0), torch.bfloat16, 64, False, True),
        ((8, 0), torch.float16, 256, False, True),
        ((10, 0), torch.bfloat16, 128, False, True),
        (None, torch.bfloat16, 64, False, False),
        ((9, 0), torch.float32, 64, False, False),
        ((9, 0), torch.bfloat16, 64, True, False),
        ((7, 5), torch.float16, 64, False, False),
        ((9, 0), torch.bfloat16, 60, False, False),
        ((9, 0), torch.bfloat16, 264, False, False),
    ],
)
def test_who_takes_borders(
    capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int, in_context: bool, takes: bool
) -> None:
    assert takes_varlen(capability, dtype, head_dim, in_context) is takes


class Calls(TorchDispatchMode):
    """What operators are called with, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.setdefault(func.name(), []).append(args)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not varlen_found(), reason="this torch has no variable-length attention with grouped heads")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_model_gives_attention_its_borders(recompute: str) -> None:
    """On the meta device: shapes and calls without values. Selective recomputation keeps attention's output."""
    with torch.device("meta"):
        model = Decoder(SHAPE, "bf16")
    model.packing = Packing(END, varlen=True, room=4)
    set_up(model, "none", recompute)  # type: ignore[arg-type]
    tokens = torch.zeros(2, 16, dtype=torch.long, device="meta")
    with Calls() as calls:
        hidden = model.hidden(tokens)
        hidden.sum().backward()
    assert hidden.shape == (2, 16, 32)
    forward = calls.found["torch_attn::_varlen_attn"]
    assert len(forward) == (2 if recompute == "full" else 1) * SHAPE.depth
    assert len(calls.found["torch_attn::_varlen_attn_backward"]) == SHAPE.depth
    query, key, value, of_queries, of_keys, longest, longest_key, is_causal = forward[0][:8]
    assert (query.shape, key.shape, value.shape) == ((32, 4, 8), (32, 2, 8), (32, 2, 8))
    assert of_queries.shape == of_keys.shape == (9,)
    assert (longest, longest_key, is_causal) == (16, 16, True)
    assert not [name for name in calls.found if "scaled_dot_product" in name]


def test_layers_compile_once_for_any_documents() -> None:
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    model = Decoder(SHAPE)
    model.initialise(0)
    model.packing = Packing(END)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, ids, (2, 16), generator=generator) for ids in (90, 2, 9)]
    eager = [model(tokens) for tokens in batches]
    model.hidden = torch.compile(model.hidden, backend=backend, dynamic=False, fullgraph=True)  # type: ignore[method-assign]
    torch.testing.assert_close([model(tokens) for tokens in batches], eager)
    assert len(compiled) == 1
    borders = torch.compile(document_borders, backend=backend, dynamic=False, fullgraph=True)
    for tokens in batches:
        assert torch.equal(borders(tokens, END, 16), document_borders(tokens, END, 16))
    assert len(compiled) == 2


def test_stacked_runs_stay_within_their_documents() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randint(0, 6, (2, 4, 16), generator=generator) for _ in range(2))
    losses = {}
    for packing in (None, Packing(END)):
        models = []
        for seed in range(2):
            models.append(Decoder(SHAPE))
            models[-1].initialise(seed)
            models[-1].packing = packing
        alone = [float(model.loss(x, y).detach()) for model, x, y in zip(models, inputs, targets, strict=True)]
        losses[packing] = StackedDecoder(models).gradients(inputs, targets, 0.0, 1.0, micro=3).tolist()
        assert losses[packing] == pytest.approx(alone, rel=1e-6)
    assert losses[None] != pytest.approx(losses[Packing(END)], rel=1e-4)


def test_a_captured_pass_is_captured_anew_when_there_is_more_room() -> None:
    packing = [Packing(END, varlen=True, room=4)]
    seen: list[int] = []

    def work(inputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(inputs.data_ptr())
        return inputs.sum() + targets.sum()

    captured = CapturedPass(work, [], lambda: packing[0])
    batch = torch.ones(2, 8), torch.ones(2, 8)
    kept = [captured(*batch) for _ in range(2)]
    packing[0] = dataclasses.replace(packing[0], room=8)
    kept += [captured(*batch) for _ in range(2)]
    assert [float(loss) for loss in kept] == [32.0] * 4
    assert seen[0] == seen[1] != batch[0].data_ptr()
    assert seen[2] == seen[3] != seen[1]


@pytest.mark.parametrize(("precision", "value"), [("fp32", 4), ("bf16", 2)])
def test_the_accounting_counts_the_masks_that_are_kept(precision: str, value: int) -> None:
    tokens = torch.arange(64).view(4, 16) % 7
    kept = {}
    for packing in (None, Packing(END)):
        model = Decoder(SHAPE, precision)
        model.initialise(0)
        model.packing = packing
        held: dict[int, int] = {}

        def keep(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.loss(tokens, tokens)
        kept[packing] = sum(held.values())
        del loss
    found = kept[Packing(END)] - kept[None]
    assert found == SHAPE.depth * value * 64 * 16
    with_mask, without = (
        training_bytes(SHAPE, 64, precision=precision, document_mask=masked).activations for masked in (True, False)
    )
    assert with_mask - without == found
    every, none = (training_bytes(SHAPE, 64, recompute="full", document_mask=m).activations for m in (True, False))
    assert every - none == 64 * 16  # the mask itself, once


def test_memory_is_predicted_with_a_mask_only_where_one_is_made(make_spec: Specs) -> None:
    spec = make_spec()
    masked = dataclasses.replace(spec, data=dataclasses.replace(spec.data, document_mask=True))
    now = settings(masked, Host(), None)
    assert not now.varlen  # a CPU
    plain = Settings(now.micro_batch_tokens).step_bytes(spec).total
    assert settings(spec, Host(), None).step_bytes(spec).total == plain
    assert now.step_bytes(masked).total > plain
    assert dataclasses.replace(now, varlen=True).step_bytes(masked).total == plain


@pytest.mark.parametrize("kernels", FLASH)
def test_kernels_that_are_asked_for_are_there_or_refused(kernels: str) -> None:
    capability = {"flash3": (9, 0), "flash4": (10, 0)}[kernels]
    bf16 = torch.bfloat16
    assert choose_attention(kernels, capability, bf16, FLASH) == (kernels, "asked for")  # type: ignore[arg-type]
    other = {"flash3": (10, 0), "flash4": (8, 0)}[kernels]
    for on, dtype, present, why in (
        (None, bf16, FLASH, "the device is not a CUDA GPU"),
        (other, bf16, FLASH, f"there are none for compute capability {other[0]}.0"),
        (capability, torch.float32, FLASH, "they take no fp32"),
        (capability, bf16, [], f"{FLASH[kernels].module} cannot be imported"),
    ):
        with pytest.raises(InputError, match=f"attention={kernels}: {why}: use attention=sdpa"):
            choose_attention(kernels, on, dtype, present)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "present", "chosen", "why"),
    [
        (None, (), "sdpa", "the device is not a CUDA GPU"),
        ((8, 0), tuple(FLASH), "sdpa", "there are none for compute capability 8.0"),
        ((9, 0), (), "sdpa", "flash_attn_interface cannot be imported"),
        ((9, 0), ("flash4",), "sdpa", "flash_attn_interface cannot be imported"),
        ((9, 0), tuple(FLASH), "flash3", "compute capability 9.0"),
        ((10, 0), tuple(FLASH), "flash4", "compute capability 10.0"),
        ((10, 0), ("flash3",), "sdpa", "flash_attn.cute.interface cannot be imported"),
        ((12, 0), tuple(FLASH), "sdpa", "there are none for compute capability 12.0"),
    ],
)
def test_auto_takes_the_kernels_of_the_device(
    capability: tuple[int, int] | None, present: tuple[str, ...], chosen: str, why: str
) -> None:
    assert choose_attention("auto", capability, torch.bfloat16, present) == (chosen, why)
    assert choose_attention("sdpa", capability, torch.float32, present) == ("sdpa", "asked for")


def test_torch_knows_the_kernels_by_these_names() -> None:
    attention = pytest.importorskip("torch.nn.attention")
    if not hasattr(attention, "list_flash_attention_impls"):
        pytest.skip("this torch has no other kernels than its own")
    assert {kernels.implementation for kernels in FLASH.values()} <= set(attention.list_flash_attention_impls())
    assert all(major in FLASH[kernels].capabilities for major, kernels in BEST.items())
    use_attention("sdpa")
    assert attention.current_flash_attention_impl() is None


def test_this_machine_trains_on_torchs_own(make_spec: Specs, capfd: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() or any(map(importable, FLASH)):
        pytest.skip("this machine has other kernels")
    spec = make_spec()
    assert spec.data.digest is not None
    corpus = Corpus.open(spec.data.digest)
    made = Trainer(spec, corpus, Host())
    assert "attention" not in capfd.readouterr().err
    assert made.model.packing is None  # type: ignore[union-attr]
    masked = dataclasses.replace(spec, data=dataclasses.replace(spec.data, document_mask=True))
    assert Trainer(masked, corpus, Host()).model.packing == Packing(EOS)  # type: ignore[union-attr]
    for kernels in ("flash3", "flash4"):
        with pytest.raises(
            InputError, match=f"attention={kernels}: the device is not a CUDA GPU: use attention=sdpa"
        ):
            Trainer(spec, corpus, Host(attention=kernels))  # type: ignore[arg-type]


def test_workers_are_told_the_kernels() -> None:
    assert "--attention" not in LocalLauncher().worker_options()
    options = LocalLauncher(attention="flash3").worker_options()
    assert options[options.index("--attention") + 1] == "flash3"


def test_ranks_that_share_a_sequence_are_given_a_mask() -> None:
    context = Context(None, 0, 2)  # type: ignore[arg-type]
    documents = Documents(borders_N=torch.tensor([0, 4]))
    with pytest.raises(AssertionError):
        attend(*(torch.zeros(1, 4, 1, 8) for _ in range(3)), context, documents)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="variable-length attention runs on a GPU alone")
def test_on_a_gpu_borders_give_what_the_mask_gives() -> None:
    device = torch.device("cuda")
    packing = Packing.on(device, torch.bfloat16, 64, END)
    assert packing.varlen
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 40, (4, 256), generator=generator)
    found = []
    for how in (packing.with_room(tokens), packing, Packing(END)):
        generator.manual_seed(1)
        shapes = ((4, 256, heads, 64) for heads in (4, 2, 2))
        qkv = [torch.randn(s, generator=generator).to(device, torch.bfloat16).requires_grad_() for s in shapes]
        out = attend(*qkv, None, how.documents(tokens.to(device)))
        found.append([out, *torch.autograd.grad(out.float().square().sum(), qkv)])
    torch.testing.assert_close(found[0], found[2], rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(found[1], found[2], rtol=3e-2, atol=3e-2)
