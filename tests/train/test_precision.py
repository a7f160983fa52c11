"""How a run is run: compilation, recomputation, what it chooses by itself; measures and the profile."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from scaling.accounting import flops_per_token, recomputed_flops
from scaling.cost import run_seconds
from scaling.errors import InputError
from scaling.hardware import DEVICES
from scaling.launch import LocalLauncher
from scaling.shape import Experts, ModelShape
from scaling.slurm.launcher import SlurmLauncher
from scaling.spec import RunSpec
from scaling.sweepdir import RunDir
from train.engine import Host, train
from train.model.decoder import Decoder
from train.model.fp8 import use_fp8
from train.model.kernels import choose, set_up
from train.model.layers import Linear

SHAPE = ModelShape(width=32, depth=2, n_heads=4, d_ff=88, vocab_size=96, seq_len=16)


def model_of(recompute: str = "none", shape: ModelShape = SHAPE, **settings: str) -> Decoder:
    model = Decoder(shape)
    model.initialise(0)
    set_up(model, settings.get("compiled", "none"), recompute)  # type: ignore[arg-type]
    return model


def loss_and_gradients(model: Decoder) -> tuple[torch.Tensor, ...]:
    tokens = torch.arange(64).view(4, 16)
    loss = model.loss(tokens, tokens.flip(0))
    loss.backward()
    return (loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None))


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("experts", [None, Experts(4, 2)])
def test_recomputation_changes_no_bit(recompute: str, experts: Experts | None) -> None:
    shape = dataclasses.replace(SHAPE, experts=experts)
    plain, again = (loss_and_gradients(model_of(which, shape)) for which in ("none", recompute))
    assert len(plain) == len(again)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def product_flops(recompute: str) -> int:
    """FLOPs of the matrix products of a forward and backward pass; the counter does not know the CPU's attention."""
    model = model_of(recompute)
    with FlopCounterMode(display=False) as counter:
        loss_and_gradients(model)
    return counter.get_total_flops()


def test_what_is_computed_again() -> None:
    per_token, tokens = flops_per_token(SHAPE), 64
    plain = product_flops("none")
    for recompute, attention in (("selective", 0.0), ("full", per_token.attention_scores)):
        again = recomputed_flops(SHAPE, recompute) - attention
        assert product_flops(recompute) - plain == pytest.approx(again * tokens, rel=1e-12)
    assert recomputed_flops(SHAPE, "none") == 0


def test_a_run_records_utilisation_in_both_conventions(make_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    spec = make_spec(steps=12)
    record = train(spec, RunDir(tmp_path / "plain"), Host())
    again = train(spec, RunDir(tmp_path / "again"), Host(recompute="full"))
    assert again.loss == record.loss
    assert record.hfu == record.mfu
    assert None not in (record.mfu, record.mfu_full_attention, again.hfu, again.mfu)
    assert record.mfu_full_attention > record.mfu  # type: ignore[operator]
    share = recomputed_flops(spec.shape, "full") / flops_per_token(spec.shape).train
    assert again.hfu / again.mfu == pytest.approx(1 + share)  # type: ignore[operator]
    assert record.data_wait_s is not None
    assert 0 <= record.data_wait_s < record.train_s


def test_a_profile_of_some_steps(make_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    record = train(make_spec(steps=12), run, Host(profile_steps=2))
    assert record.loss == train(make_spec(steps=12), RunDir(tmp_path / "plain"), Host()).loss
    assert "aten::mm" in (run.path / "profile" / "table.txt").read_text()
    with gzip.open(run.path / "profile" / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2


def test_auto_chooses_by_the_expected_time_alone(
    make_spec: Callable[..., RunSpec], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose("auto", 119.0, SHAPE)[0] == "none"
    assert choose("auto", 121.0, SHAPE)[0] == "block"
    assert choose("whole", 1.0, SHAPE)[0] == "whole"
    assert choose("auto", 1e6, dataclasses.replace(SHAPE, experts=Experts(4, 1)))[0] == "none"
    spec = make_spec(steps=12)
    record = train(spec, RunDir(tmp_path / "auto"), Host(compile="auto"))
    assert f"run {spec.run_id}: compile=none: about " in capsys.readouterr().err
    assert record.loss == train(spec, RunDir(tmp_path / "plain"), Host()).loss


def test_a_sweep_has_one_setting_for_all_runs() -> None:
    for launcher in (LocalLauncher, SlurmLauncher):
        assert "--compile" not in launcher().worker_options()
        options = launcher(compile="block", recompute="full").worker_options()
        assert options[options.index("--compile") + 1] == "block"
        assert options[options.index("--recompute") + 1] == "full"


def test_experts_are_not_compiled() -> None:
    with pytest.raises(InputError, match="compile=block: the shapes of experts follow the data"):
        model_of(shape=dataclasses.replace(SHAPE, experts=Experts(4, 1)), compiled="block")


@pytest.mark.filterwarnings("ignore")  # torch.compile warns of torch
@pytest.mark.slow
def test_compiled_layers_compute_the_same_but_for_rounding() -> None:
    """The compiler takes half a minute of a core."""
    plain, compiled = loss_and_gradients(model_of()), loss_and_gradients(model_of(compiled="block"))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


# -- fp8: torch has its product on the CPU too, so the tests run what a GPU runs


def test_fp8_products_and_their_gradients_are_near_the_exact_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 64, generator=generator, dtype=torch.bfloat16, requires_grad=True)
    seen = torch.randn(2, 16, 48, generator=generator).bfloat16()
    linear = Linear(64, 48)
    exact = torch.autograd.grad((linear(x) * seen).sum(), [x, linear.weight])
    out = linear(x)
    use_fp8(nn.ModuleList([linear]))
    rounded = torch.autograd.grad((linear(x) * seen).sum(), [x, linear.weight])
    for got, wanted in zip((linear(x), *rounded), (out, *exact), strict=True):
        assert got.dtype == wanted.dtype
        error = (got - wanted).float().norm() / wanted.float().norm()
        assert 0.005 < error < 0.08  # 3 bits of mantissa forward, 2 backward


def test_a_model_learns_in_fp8() -> None:
    shape = dataclasses.replace(SHAPE, d_ff=96, n_heads=2)
    losses = {}
    for precision in ("bf16", "fp8"):
        model = Decoder(shape, precision)
        model.initialise(0)
        if precision == "fp8":
            use_fp8(model.model.layers)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        ids = torch.randint(0, 96, (8, 16), generator=torch.Generator().manual_seed(0))
        for _ in range(30):
            loss = model.loss(ids[:, :-1], ids[:, 1:]) / 120
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[precision] = loss.item()
    assert losses["fp8"] < 0.5  # from 5.0
    assert losses["fp8"] == pytest.approx(losses["bf16"], abs=0.1)
    assert losses["fp8"] != losses["bf16"]


def test_fp8_is_refused_where_it_cannot_be(make_spec: Callable[..., RunSpec], tmp_path: Path) -> None:
    spec = make_spec(precision="fp8")
    with pytest.raises(InputError, match=r"precision=fp8: cpu has no fp8 products .*: use bf16"):
        train(spec, RunDir(tmp_path / "run"), Host())
    with pytest.raises(InputError, match=r"unknown dtype of cpu 'fp8': .*bf16, fp32"):
        run_seconds(spec, DEVICES["cpu"])
    with pytest.raises(InputError, match=r"mlp\.gate_proj is 88 × 32: both must be multiples of 16"):
        use_fp8(Decoder(SHAPE, "fp8").model.layers)
    assert make_spec().run_id != spec.run_id
