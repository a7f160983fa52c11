"""Devices: what they can do at most, what they draw, what an hour of them costs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from scaling.errors import unknown


@dataclass(frozen=True)
class Device:
    """One accelerator, or one CPU core. Peaks are dense (no sparsity), as the maker's data sheet states them."""

    name: str
    peak_flops: Mapping[str, float] = field(repr=False)
    """FLOP/s by dtype: fp32 (tf32 on tensor cores where there are any), bf16 (fp16 before Ampere), fp8."""
    memory_bytes: float
    bandwidth: float
    """Memory bandwidth, bytes/s."""
    watts: float
    """Board power limit."""
    usd_per_hour: tuple[float, float]
    """Rent: long contract, on demand (2025 list prices, rounded)."""

    def peak(self, dtype: str) -> float:
        """Peak dense FLOP/s in a dtype.

        Raises:
            InputError: the device has no such dtype.
        """
        if dtype not in self.peak_flops:
            raise unknown(f"dtype of {self.name}", dtype, self.peak_flops)
        return self.peak_flops[dtype]


def _gpu(
    name: str,
    fp32: float,
    bf16: float,
    fp8: float | None,
    gigabytes: float,
    terabytes_s: float,
    watts: float,
    usd: tuple[float, float],
) -> Device:
    peaks = {"fp32": fp32 * 1e12, "bf16": bf16 * 1e12} | ({"fp8": fp8 * 1e12} if fp8 else {})
    return Device(name, peaks, gigabytes * 1e9, terabytes_s * 1e12, watts, usd)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # One core of a server CPU: two 8-wide fp32 multiply-adds a cycle (AVX2) at 3 GHz; a cloud's virtual core is
        # half of one at worst. Watts and rent are a core's share of its server.
        Device("cpu", {"fp32": 96e9, "bf16": 96e9}, 4e9, 10e9, 5.0, (0.01, 0.05)),
        # TFLOP/s fp32/tf32, bf16/fp16, fp8; GB; TB/s; W; from NVIDIA's data sheets, SXM where there is a choice
        _gpu("v100", 15.7, 125, None, 32, 0.90, 300, (0.5, 3.0)),  # Tesla V100 data sheet (fp16 tensor cores)
        _gpu("t4", 8.1, 65, None, 16, 0.32, 70, (0.2, 0.5)),  # T4 data sheet (fp16 tensor cores)
        _gpu("a100", 156, 312, None, 80, 2.04, 400, (1.1, 2.2)),  # A100 80GB SXM data sheet
        _gpu("l40s", 183, 362, 733, 48, 0.86, 350, (0.8, 1.9)),  # L40S data sheet
        _gpu("rtx4090", 82.6, 165, 330, 24, 1.01, 450, (0.3, 0.7)),  # Ada architecture paper, fp32 accumulation
        _gpu("h100", 494.5, 989, 1979, 80, 3.35, 700, (2.0, 2.85)),  # H100 SXM data sheet
        _gpu("h200", 494.5, 989, 1979, 141, 4.80, 700, (2.3, 3.8)),  # H200 SXM data sheet
        _gpu("b200", 1125, 2250, 4500, 180, 7.70, 1000, (3.0, 6.0)),  # HGX B200 data sheet
    )
}


def find_device(name: str) -> Device:
    """The device of this name.

    Raises:
        InputError: not in the table.
    """
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    return DEVICES[name]


def match_device(description: str) -> Device | None:
    """The device that a driver's own name for it contains ("NVIDIA H200" → h200), or None."""
    words = description.lower().replace("geforce rtx ", "rtx").replace("-", " ").split()
    return next((device for name, device in DEVICES.items() if name in words), None)


def cpu_count() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
