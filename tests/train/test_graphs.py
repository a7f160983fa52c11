"""The captured pass: the bookkeeping of its buffers on a CPU, the graph itself where there is a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from scaling.errors import InputError
from scaling.shape import Experts
from scaling.spec import RunSpec
from train.data.loader import Corpus
from train.engine.graphs import CapturedPass, check_graphs
from train.engine.host import Host
from train.engine.trainer import Trainer

Specs = Callable[..., RunSpec]


def trainer(spec: RunSpec, host: Host, capture: bool = False) -> Trainer:
    assert spec.data.digest is not None
    made = Trainer(spec, Corpus.open(spec.data.digest), host)
    if capture:
        made.captured = CapturedPass(made._pass, made.parameters)
    return made


def losses(made: Trainer, steps: int = 12) -> list[float]:
    return [made.step(*made.loader.batch(step))["train_loss"] for step in range(steps)]


@pytest.mark.parametrize("micro", [256, 96, 32], ids=["one pass", "passes of two shapes", "eight passes"])
def test_same_bits_on_buffers_that_stay(make_spec: Specs, micro: int) -> None:
    spec, host = make_spec(), Host(micro_batch_tokens=micro)
    assert losses(trainer(spec, host, capture=True)) == losses(trainer(spec, host))


def test_a_skipped_step_leaves_nothing_behind(make_spec: Specs) -> None:
    spec = make_spec(optim="adamw")
    found = []
    for capture in (False, True):
        made = trainer(spec, Host(), capture)
        rows = [made.step(*made.loader.batch(0))]
        weight = made.parameters[-1].data
        kept = weight.clone()
        weight.fill_(torch.inf)
        assert made.step(*made.loader.batch(1))["skipped"] == 1
        weight.copy_(kept)
        found.append([*(row["train_loss"] for row in rows), *losses(made)])
    assert found[0] == found[1]


def test_refused_where_there_are_no_graphs(make_spec: Specs) -> None:
    spec = make_spec()
    with pytest.raises(InputError, match="device cpu has none: use a GPU, or cuda_graphs = false"):
        trainer(spec, Host(cuda_graphs=True))
    experts = dataclasses.replace(spec.shape, experts=Experts(n_experts=2, top_k=1))
    with pytest.raises(InputError, match="experts follow the data"):
        check_graphs(torch.device("cuda"), experts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing is captured on a CPU")
@pytest.mark.parametrize("compiled", ["none", "block"])
def test_a_graph_trains_as_its_kernels_do(make_spec: Specs, compiled: str) -> None:
    spec = make_spec(optim="adamw")
    for micro in (256, 96):
        host = Host(device="cuda", micro_batch_tokens=micro, compile=compiled)  # type: ignore[arg-type]
        plain = losses(trainer(spec, host))
        graphed = losses(trainer(spec, dataclasses.replace(host, cuda_graphs=True)))
        assert graphed == pytest.approx(plain, rel=1e-5)
