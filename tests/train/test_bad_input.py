"""What a run refuses before it trains: layouts that do not divide, sequences and vocabularies that do not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scaling.errors import InputError
from scaling.shape import Experts, ModelShape
from scaling.spec import DataSpec, EvalSpec, OptimSpec, RunSpec, ScheduleSpec
from scaling.steptime import Layout
from scaling.sweepdir import RunDir
from train.engine import Host, train
from train.engine.host import check_one_process
from train.engine.parallel.mesh import check_layout, complete_layout
from train.model.cache import KVCache
from train.model.decoder import Decoder

SHAPE = ModelShape(width=48, depth=6, n_heads=6, d_ff=120, vocab_size=300, seq_len=32, n_kv_heads=3)
SPEC = RunSpec(
    shape=SHAPE,
    data=DataSpec("stdlib"),
    tokens=40 * 768,
    batch_tokens=768,
    optim=OptimSpec("muon", 0.01),
    schedule=ScheduleSpec("wsd", warmup_tokens=0),
    eval=EvalSpec(1024),
)
"""24 sequences a step."""


def with_shape(**change: object) -> RunSpec:
    return dataclasses.replace(SPEC, shape=dataclasses.replace(SHAPE, **change))  # type: ignore[arg-type]


LAYOUTS = [
    (SPEC, 4, {"data": 2}, r"is of 2 ranks, there are 4: data × tensor × pipeline × context must be 4"),
    (SPEC, 5, {}, r"data 5 does not divide 24 sequences a step: use one of \[1, 2, 3, 4\]"),
    (SPEC, 4, {"data": 4, "replicas": 3}, r"replicas 3 does not divide 4 data ranks: use one of \[1, 2, 4\]"),
    (SPEC, 2, {"micro_batch": 5}, r"micro_batch 5 does not divide 12 sequences of a data rank"),
    (SPEC, 4, {"tensor": 4}, r"tensor 4 does not divide 6 query heads: use one of \[1, 2, 3\]"),
    (SPEC, 2, {"tensor": 2}, r"tensor 2 does not divide 3 key/value heads: use one of \[1\]"),
    (with_shape(d_ff=121), 3, {"tensor": 3}, r"tensor 3 does not divide 121 d_ff"),
    (with_shape(vocab_size=301), 3, {"tensor": 3}, r"tensor 3 does not divide 301 vocabulary entries"),
    (SPEC, 3, {"tensor": 3}, r"tensor 3 does not divide 32 tokens of a sequence's part"),
    (SPEC, 3, {"context": 3}, r"2 × context 6 does not divide 32 tokens of a sequence"),
    (SPEC, 8, {"pipeline": 8}, r"8 pipeline stages for 6 layers: pipeline × chunks must be at most 6"),
    (SPEC, 2, {"pipeline": 2, "chunks": 2}, r"chunks = 2 needs schedule=interleaved or zero_bubble"),
    (
        SPEC,
        3,
        {"pipeline": 3, "micro_batch": 12},
        r"2 micro-batches of 12 do not fill 3 stages: use micro_batch at most 8",
    ),
    (with_shape(tied_embeddings=True), 2, {"pipeline": 2}, r"tied embeddings need pipeline = 1"),
    (with_shape(experts=Experts(4, 2, balance="loss")), 2, {"pipeline": 2}, r"balance=loss need pipeline = 1"),
]


@pytest.mark.parametrize(("spec", "ranks", "fixed", "message"), LAYOUTS, ids=[case[3][:30] for case in LAYOUTS])
def test_layouts_that_do_not_divide(spec: RunSpec, ranks: int, fixed: dict[str, int | str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_layout(spec, complete_layout(spec, fixed, ranks, 768), ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8, 12, 24])
def test_data_ranks_that_divide_are_accepted(ranks: int) -> None:
    layout = complete_layout(SPEC, {}, ranks, 768)
    check_layout(SPEC, layout, ranks)
    assert layout == Layout(data=ranks, micro_batch=24 // ranks, shard="parameters")


@pytest.mark.parametrize(
    ("spec", "host", "message"),
    [
        (dataclasses.replace(SPEC, precision="fp8"), Host(), "precision=fp8 trains in one process alone"),
        (SPEC, Host(compile="whole"), "compile=whole trains in one process alone"),
        (SPEC, Host(cuda_graphs=True), "cuda_graphs trains in one process alone"),
    ],
)
def test_what_several_ranks_cannot_do(spec: RunSpec, host: Host, message: str) -> None:
    with pytest.raises(InputError, match=rf"{message}.*: use one rank, or "):
        check_one_process(spec, host)


def test_a_sequence_longer_than_the_positions_are_built_for() -> None:
    model = Decoder(SHAPE)
    model.initialise(0)
    tokens = torch.zeros(1, 33, dtype=torch.int64)
    refused = r"33 tokens at once: this model's positions \(RoPE\) are built for 32"
    for call in (model, lambda t: model.loss(t, t)):
        with pytest.raises(InputError, match=refused):
            call(tokens)
    cache = KVCache(SHAPE, 32, model.dtype, torch.device("cpu"))
    with torch.no_grad():
        model.hidden(tokens[:, :32], cache)
        with pytest.raises(InputError, match=refused):
            model.hidden(tokens[:, 32:], cache)


@pytest.mark.parametrize("vocab_size", [299, 70_000])
def test_another_vocabulary_than_the_shards(
    vocab_size: int, make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    """70,000 entries do not fit the shards' two bytes."""
    spec = make_spec()
    spec = dataclasses.replace(spec, shape=dataclasses.replace(spec.shape, vocab_size=vocab_size))
    with pytest.raises(
        InputError, match=f"model.vocab_size = {vocab_size}: .* of 300 entries, its tokens in 2 bytes"
    ):
        train(spec, RunDir(tmp_path / "run"))
    assert RunDir(tmp_path / "run").record() is None
