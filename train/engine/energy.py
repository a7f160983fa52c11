"""Energy that a device took, where it counts: NVIDIA's total since the driver was loaded, Intel's RAPL for processors.

A counter is the whole device's, other work on it included. Processor counters are often readable by root alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


class EnergyMeter:
    """Joules since it was made; None where the device does not tell."""

    def __init__(self, device: torch.device, powercap: Path = RAPL) -> None:
        """
        Args:
            powercap: Linux's folder of RAPL zones, intel-rapl:0, intel-rapl:1, …, one a processor package.
        """
        self._counters = _gpu(device) if device.type == "cuda" else _packages(powercap)
        self._start = self._read()

    def joules(self) -> float | None:
        """Since the meter was made; a counter that began anew since then is taken to have done so once."""
        now = self._read()
        if now is None or self._start is None:
            return None
        ends = (wrap for _, wrap in self._counters)
        spent = (b - a if b >= a else b - a + wrap for a, b, wrap in zip(self._start, now, ends, strict=True))
        return sum(spent)

    def _read(self) -> list[float] | None:
        try:
            return [read() for read, _ in self._counters] or None
        except (OSError, ValueError):
            return None


Counter = tuple[Callable[[], float], float]
"""Reads joules, and where it begins again at 0."""


def _packages(powercap: Path) -> list[Counter]:
    """Of the processor packages, not of their parts (intel-rapl:0:0, cores, is in intel-rapl:0)."""

    def reader(file: Path) -> Callable[[], float]:
        return lambda: int(file.read_text()) / 1e6

    try:
        zones = sorted(zone for zone in powercap.glob("intel-rapl:*") if zone.name.count(":") == 1)
        return [(reader(z / "energy_uj"), int((z / "max_energy_range_uj").read_text()) / 1e6) for z in zones]
    except (OSError, ValueError):
        return []


def _gpu(device: torch.device) -> list[Counter]:
    """By NVIDIA's management library, where nvidia-ml-py is installed and the GPU counts (Volta and later)."""
    try:
        import pynvml  # type: ignore[import-not-found]

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no library, no such counter, no permission: the run goes on without the figure
        return []
    return [(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)]
