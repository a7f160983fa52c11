"""Costs: the lecture's example, Llama 3 and DeepSeek-V3, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

import pytest

from scaling.cost import GOODPUT, default_batch, main, pool_seconds, training_cost
from scaling.errors import InputError
from scaling.hardware import DEVICES, find_device
from scaling.steptime import ATTENTION_SHARE, LINK_SHARE, MEMORY_SHARE, NETWORK_SHARE, TRAINING_SHARE

LLAMA = ["--params", "405e9", "--tokens", "15.6e12", "--device", "h100"]


def cost(capsys: pytest.CaptureFixture[str], *args: str) -> dict:  # type: ignore[type-arg]
    main([*args, "--json", "-"])
    out: dict = json.loads(capsys.readouterr().out)  # type: ignore[type-arg]
    return out


def test_lecture_example(capsys: pytest.CaptureFixture[str]) -> None:
    """3.8e25 FLOPs; 26M GPU-hours, 70 days, $52–75M, 4,400 t CO2e."""
    got = cost(capsys, *LLAMA, "--devices", "16000", "--tflops", "400")
    assert round(got["flops"] / 1e25, 1) == 3.8
    assert round(got["gpu_hours"] / 1e6) == 26
    assert round(got["days"], -1) == 70
    assert [round(usd / 1e6, -0) for usd in got["ranges"]["cost_usd"]] == pytest.approx([52, 75], abs=1)
    assert got["co2e_t"] == pytest.approx(4400, rel=0.02)
    assert got["energy_mwh"] == pytest.approx(18_400, rel=0.01)


def test_lecture_example_with_people(capsys: pytest.CaptureFixture[str]) -> None:
    """52.65 of rent and 50 people × $500,000 a year: 77.65, which the lecture calls ~75."""
    args = [*LLAMA, "--devices", "16000", "--tflops", "400", "--people", "50"]
    got = cost(capsys, *args)
    assert got["cost_usd"] == pytest.approx(52e6, rel=0.015)
    assert got["total_usd"] == pytest.approx(75e6, rel=0.04)
    main([*args, "--explain"])
    text = capsys.readouterr().out
    for assumption in ("6·N·D", "400 TFLOP/s", "700 W", "0.24 kg/kWh", "2 USD", "50 people × 500,000 USD × 1 y"):
        assert assumption in text


def test_gpt_3(capsys: pytest.CaptureFixture[str]) -> None:
    """3,640 PF-days (arXiv 2005.14165, table D.1) on 300B tokens."""
    got = cost(capsys, "--params", "174.6e9", "--tokens", "300e9")
    assert got["flops"] / 8.64e19 == pytest.approx(3640, rel=0.005)


def test_mfu_and_tflops_are_the_same_thing(capsys: pytest.CaptureFixture[str]) -> None:
    """400 TFLOP/s is 41% of an H100's 989 in Llama 3's words."""
    by_mfu = cost(capsys, *LLAMA, "--mfu", str(400 / 989))
    by_rate = cost(capsys, *LLAMA, "--tflops", "400")
    assert math.isclose(by_mfu["gpu_hours"], by_rate["gpu_hours"], rel_tol=1e-12)


def test_llama_3_all_in_hours_lie_between_step_rate_and_goodput() -> None:
    """30.84M GPU-hours were used for 3.8e25 FLOPs at 400 TFLOP/s a step: within the range that goodput spans."""
    low, high = training_cost(3.79e25, find_device("h100"), 16384, 400e12).ranges["gpu_hours"]
    assert low < 30.84e6 < high


def test_llama_3_is_34_6_percent_all_in() -> None:
    """30.84M GPU-hours of 989 TFLOP/s against 41% a step: goodput and all else that is not a step is .85."""
    all_in = 3.8e25 / (30.84e6 * 3600 * find_device("h100").peak("bf16"))
    assert all_in == pytest.approx(0.346, abs=0.001)
    assert all_in / (400 / 989) == pytest.approx(GOODPUT[0], abs=0.01)


def test_deepseek_v3(capsys: pytest.CaptureFixture[str]) -> None:
    """37B active × 14.8T = 3.29e24 FLOPs in 2.664M H800-hours (an H100's peak): 34.7% of the bf16 peak."""
    got = cost(capsys, "--params", "37e9", "--tokens", "14.8e12", "--mfu", "0.347")
    assert got["flops"] == pytest.approx(3.29e24, rel=2e-3)
    assert got["gpu_hours"] == pytest.approx(2.664e6, rel=5e-3)
    assert got["cost_usd"] == pytest.approx(2.664e6 * 2, rel=5e-3)


def test_shape_is_laid_out_and_priced(capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 3's own degrees: 30.84M GPU-hours were used, the plan with goodput says 30.9M."""
    args = ["--shape", "llama3-405b", "--tokens", "15.6e12", "--devices", "16384"]
    got = cost(capsys, *args, "--layout", "tensor=8,pipeline=16,context=1")
    assert {"flops", "gpu_hours", "days", "energy_mwh", "co2e_t", "cost_usd"} < set(got)
    assert {"layout", "step_time_s", "mfu", "goodput"} < set(got)
    assert got["layout"]["data"] == 128
    assert got["batch_tokens"] == 16 * 2**20
    assert 0.38 <= got["mfu"] <= 0.43
    assert got["goodput"] > 0.9
    assert got["gpu_hours"] == pytest.approx(30.84e6, rel=0.03)
    assert sum(got["step_terms_s"].values()) == pytest.approx(got["step_time_s"])
    steps = 15.6e12 / got["batch_tokens"]
    assert got["days"] == pytest.approx(steps * got["step_time_s"] / got["goodput"] / 86400)
    for name, (low, high) in got["ranges"].items():
        assert low < got[name] < high


def test_the_plan_says_that_llama_3_fits_in_80_gb(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--shape", "llama3-405b", "--tokens", "15.6e12", "--devices", "16384"]
    main([*args, "--layout", "tensor=8,pipeline=16,context=1"])
    text = capsys.readouterr().out
    said = re.search(r"^memory +([\d.]+) of 80 GB$", text, re.M)
    assert said is not None
    assert 60 < float(said[1]) < 75.2
    assert "data 128, tensor 8, pipeline 16, context 1" in text


def test_explain_names_every_constant_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--shape", "llama3-8b", "--tokens", "1e12", "--devices", "64", "--explain"])
    text = capsys.readouterr().out
    for constant in (TRAINING_SHARE, *ATTENTION_SHARE.values(), LINK_SHARE, NETWORK_SHARE, MEMORY_SHARE):
        assert f"{constant:g}" in text or constant == ATTENTION_SHARE["flash2"]
    for source in (
        "mamf-finder",
        "torchtitan",
        "2407.08608",
        "nccl issue 1281",
        "MegaScale",
        "Young 1974",
        "√(2·δ·MTBF)",
    ):
        assert source in text


def test_own_device_and_shape(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shape", "4096,32,32,8,14336,128256", "--tokens", "1e12", "--devices", "64"]
    got = cost(capsys, *shape, "--device", "mi300x:1307,192,750,2.5")
    assert got["cost_usd"] == pytest.approx(2.5 * got["gpu_hours"])
    assert got["flops"] == cost(capsys, *shape)["flops"]


def test_default_batch_carries_odd_factors() -> None:
    assert default_batch(15.6e12, 8192, 16384) == 2048
    assert default_batch(15.6e12, 8192, 16000) == 2000
    assert default_batch(1e9, 8192, 8191) == 8


def test_mfu_and_tflops_do_not_go_with_a_shape() -> None:
    with pytest.raises(InputError, match="leave out --tflops and --mfu"):
        main(["--shape", "llama3-8b", "--tokens", "1e12", "--mfu", ".4"])


def test_ranges_contain_their_figures() -> None:
    for device in DEVICES.values():
        got = training_cost(1e20, device)
        for name, (low, high) in got.ranges.items():
            assert low <= getattr(got, name) <= high


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*LLAMA, "--tflops", "400", "--mfu", ".4"], "same thing twice"),
        ([*LLAMA, "--tflops", "4000"], "above the h100's peak"),
        (["--params", "1e9"], "both"),
        ([], "--params N and --tokens D"),
        (["--params", "-1", "--tokens", "1"], "must be positive"),
        (["--flops", "1e20", "--params", "1"], "either"),
        (["--flops", "1e20", "--device", "h10"], "unknown device 'h10': did you mean 'h100'"),
        (["--flops", "1e20", "--device", "v100", "--dtype", "fp8"], "dtype of v100"),
        (["--flops", "nan"], "must be positive"),
        (["--flops", "1e20", "--usd-per-hour", "0"], "--usd-per-hour 0.0: must be positive"),
        (["--flops", "1e20", "--usd-per-hour", "-2"], "must be positive"),
        (["--flops", "1e20", "--people", "0"], "must be positive"),
        (["--flops", "1e20", "--device", "mi300x"], "give its four numbers, NAME:TFLOPS,GB,WATTS,USD"),
        (["--flops", "1e20", "--device", "mi300x:1307,192"], "give four numbers"),
        (["--flops", "1e20", "--device", "mi300x:1307,192,750,-1"], "must be positive"),
        (["--flops", "1e20", "--layout", "tensor=8"], "give --shape too"),
        (["--shape", "llama3-9b", "--tokens", "1e12"], "did you mean 'llama3-8b'"),
        (["--shape", "4096,32,32", "--tokens", "1e12"], "six whole numbers"),
        (["--shape", "llama3-8b", "--tokens", "1e12", "--dtype", "fp32"], "in bf16 or fp8"),
        (["--shape", "llama3-8b", "--tokens", "1e12", "--attention", "flash"], "unknown attention kernel"),
        (["--shape", "llama3-8b"], "--tokens D or --flops C"),
        (["--shape", "llama3-8b", "--tokens", "1e12", "--params", "70e9"], "the shape has 8.03e"),
        (["--shape", "llama3-8b", "--tokens", "1e12", "--layout", "tensr=8"], "did you mean 'tensor'"),
        (["--shape", "llama3-8b", "--tokens", "1e12", "--layout", "tensor=two"], "whole number"),
        (["--shape", "llama3-8b", "--tokens", "1e12", "--layout", "recompute=some"], "valid: full, none, selective"),
        (["--shape", "llama3-405b", "--tokens", "1e12", "--devices", "8"], "746.0 GB more than the 75.2 GB usable"),
    ],
)
def test_bad_input(args: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(args)


def test_command_prints_one_line_and_exit_2(cli: Callable) -> None:  # type: ignore[type-arg]
    done = cli("scaling.cost", "--flops", "1e20", "--device", "abacus")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_pool_takes_the_longest_first() -> None:
    assert pool_seconds([1, 1, 1, 3], workers=2) == 3
    assert pool_seconds([], workers=2) == 0
