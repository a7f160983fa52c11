"""Share of the wall time that trains, with failures and the checkpoint interval that loses least (Young, Daly)."""

from __future__ import annotations

import math
from dataclasses import dataclass

DEVICE_MTBF_S = 16384 * 54 * 86400 / 466
"""Device-seconds between interruptions: Llama 3 405B had 466 in 54 days on 16,384 H100, 47 of them planned
(arXiv 2407.21783, section 3.3.4). 45,600 hours."""
RESTART_S = 600.0
"""Seconds from a failure to training again: MegaScale detects, diagnoses and restarts in under 10 minutes on 12,288
devices (Jiang et al. 2024, arXiv 2402.15627, section 6.3)."""
STORAGE_BYTES_PER_DEVICE_S = 2e12 / 16384
"""Sustained write bandwidth, a device's share: 2 TB/s for Llama 3's cluster (arXiv 2407.21783, section 3.3.1)."""
UNCERTAINTY = 2.0
"""MTBF and restart time are taken to be known within this factor: the range of `goodput_range`."""


@dataclass(frozen=True)
class Goodput:
    """Where the wall time goes. Seconds, but for the shares."""

    mtbf: float
    """Mean time between interruptions of the whole job."""
    checkpoint: float
    """δ: training stands still while a checkpoint is written."""
    restart: float
    interval: float
    """τ between checkpoints."""

    @property
    def checkpoint_share(self) -> float:
        """δ/τ."""
        return self.checkpoint / self.interval

    @property
    def rework_share(self) -> float:
        """Half an interval is trained again after each interruption: τ/(2·MTBF)."""
        return self.interval / (2 * self.mtbf)

    @property
    def restart_share(self) -> float:
        return self.restart / self.mtbf

    @property
    def share(self) -> float:
        """Training time over wall time, 1/(1 + losses): each loss is counted per second of training."""
        return 1 / (1 + self.checkpoint_share + self.rework_share + self.restart_share)


def goodput(
    devices: int,
    checkpoint_bytes: float,
    device_mtbf_s: float = DEVICE_MTBF_S,
    restart_s: float = RESTART_S,
) -> Goodput:
    """Goodput at the interval τ = √(2·δ·MTBF) (Young 1974; Daly 2006, first order).

    Args:
        devices: any one of them stops the job.
        checkpoint_bytes: written by all devices together, training standing still meanwhile.
    """
    mtbf = device_mtbf_s / devices
    checkpoint = checkpoint_bytes / (STORAGE_BYTES_PER_DEVICE_S * devices)
    return Goodput(mtbf, checkpoint, restart_s, math.sqrt(2 * checkpoint * mtbf))


def goodput_range(devices: int, checkpoint_bytes: float) -> tuple[float, float]:
    """Share with MTBF and restart time both worse, or both better, by UNCERTAINTY."""
    worse = goodput(devices, checkpoint_bytes, DEVICE_MTBF_S / UNCERTAINTY, RESTART_S * UNCERTAINTY)
    better = goodput(devices, checkpoint_bytes, DEVICE_MTBF_S * UNCERTAINTY, RESTART_S / UNCERTAINTY)
    return worse.share, better.share
