"""Costs: the lecture's example, Llama 3 and DeepSeek-V3, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from scaling.cost import main, pool_seconds, training_cost
from scaling.errors import InputError
from scaling.hardware import DEVICES, find_device

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


def test_mfu_and_tflops_are_the_same_thing(capsys: pytest.CaptureFixture[str]) -> None:
    """400 TFLOP/s is 41% of an H100's 989 in Llama 3's words."""
    by_mfu = cost(capsys, *LLAMA, "--mfu", str(400 / 989))
    by_rate = cost(capsys, *LLAMA, "--tflops", "400")
    assert math.isclose(by_mfu["gpu_hours"], by_rate["gpu_hours"], rel_tol=1e-12)


def test_llama_3_all_in_hours_lie_between_step_rate_and_goodput() -> None:
    """30.84M GPU-hours were used for 3.8e25 FLOPs at 400 TFLOP/s a step: within the range that goodput spans."""
    low, high = training_cost(3.79e25, find_device("h100"), 16384, 400e12).ranges["gpu_hours"]
    assert low < 30.84e6 < high


def test_deepseek_v3_flops(capsys: pytest.CaptureFixture[str]) -> None:
    assert cost(capsys, "--params", "37e9", "--tokens", "14.8e12")["flops"] == pytest.approx(3.29e24, rel=2e-3)


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
