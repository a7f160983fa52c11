"""Goodput: Llama 3's interruptions, and Young's interval against minimisation and simulation."""

from __future__ import annotations

import numpy as np
import pytest

from scaling.goodput import DEVICE_MTBF_S, RESTART_S, Goodput, goodput, goodput_range

LLAMA3_BYTES = 12 * 405e9


def test_llama_3() -> None:
    """466 interruptions in 54 days of 16,384 devices; effective training time above 90%."""
    running = goodput(16384, LLAMA3_BYTES)
    assert 54 * 86400 / running.mtbf == pytest.approx(466)
    assert 0.90 < running.share < 0.95
    low, high = goodput_range(16384, LLAMA3_BYTES)
    assert low < 0.90 < running.share < high


def test_restarts_could_take_at_most_17_minutes_for_90_percent() -> None:
    assert (
        goodput(16384, LLAMA3_BYTES, restart_s=840).share > 0.90 > goodput(16384, LLAMA3_BYTES, restart_s=1020).share
    )


def test_interval_is_the_best_one() -> None:
    best = goodput(4096, 5e12)
    for factor in (0.5, 0.8, 1.25, 2.0):
        other = Goodput(best.mtbf, best.checkpoint, best.restart, factor * best.interval)
        assert other.share < best.share


def test_share_agrees_with_a_simulated_run() -> None:
    """Failures in training time at random, each losing the work since the last checkpoint and a restart."""
    running = goodput(4096, 2e12)
    rng = np.random.default_rng(0)
    training = 20_000 * running.mtbf
    gaps = rng.exponential(running.mtbf, 20_000)
    lost = np.mod(gaps, running.interval).sum() + len(gaps) * RESTART_S
    written = training / running.interval * running.checkpoint
    assert gaps.sum() == pytest.approx(training, rel=0.02)
    assert running.share == pytest.approx(training / (training + lost + written), abs=0.002)


def test_few_devices_lose_little() -> None:
    assert goodput(8, 12 * 8e9).share > 0.99
    assert goodput(1, 1e9).mtbf == DEVICE_MTBF_S
