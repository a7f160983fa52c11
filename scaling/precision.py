"""precision=auto: one precision for all runs of a sweep, as a fit must not mix them; chosen before the runs are made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from scaling import compose
from scaling.cost import LONG_RUN_S
from scaling.errors import InputError
from scaling.grid import GridRuns
from scaling.hardware import find_device
from scaling.rounds import extent
from scaling.sweepdir import SweepDir
from scaling.text import readable_time

WIDE = 96
"""Width from which bf16 is faster than fp32 on a processor that has its products: no faster at 64, by 1.4 at 96 (docs/log.md)."""
PRODUCTS = frozenset({"avx512_bf16", "amx_bf16"})
"""Flags of processors with matrix products in bf16, as /proc/cpuinfo names them."""

Precision = Literal["fp32", "bf16"]


def has_bf16_products(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's processor multiplies matrices in bf16; False where it does not tell."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not PRODUCTS.isdisjoint(flags.split())


def choose(device: str, seconds: float, width: float, has_products: bool | None) -> tuple[Precision, str]:
    """The precision of a sweep, with the reason.

    Args:
        device: cpu | cuda: what the launcher trains on.
        seconds: expected of the longest run on one core.
        width: mean of the runs, weighed by their seconds.
        has_products: whether the processor multiplies in bf16; None: it is another machine's.
    """
    if device == "cuda":
        return "bf16", "the runs train on a GPU"
    if has_products is None:
        return "fp32", "the processors of the jobs are not known here; give precision=bf16 if they have bf16 products"
    if not has_products:
        return "fp32", f"this processor has no bf16 products ({', '.join(sorted(PRODUCTS))})"
    if seconds <= LONG_RUN_S:
        return "fp32", f"the longest run takes about {readable_time(seconds)}, and bf16 pays over {LONG_RUN_S:.0f} s"
    if width < WIDE:
        return "fp32", f"most of the time goes to runs of about width {width:.0f}, and bf16 pays from {WIDE} on"
    return (
        "bf16",
        f"runs of up to {readable_time(seconds)} at a mean width of {width:.0f}, and the processor has bf16 products",
    )


def choose_for(runs: GridRuns, sweep: SweepDir, launcher: str, device: str) -> tuple[str, str]:
    """The precision of these runs, with the reason: that of the sweep, where it has runs, on whatever machine it goes on.

    Args:
        runs: the grid, in any precision.
        launcher: local | slurm.
        device: cpu | cuda: what it trains on.
    Raises:
        InputError: the sweep's runs are in several.
    """
    if not sweep.plan_json.exists():
        seconds, width = extent(runs, find_device("cpu"))
        return choose(device, seconds, width, has_bf16_products() if launcher == "local" else None)
    planned = sorted({spec.precision for spec in sweep.plan().runs})
    if len(planned) > 1:
        raise InputError(
            f"precision=auto: {sweep.path} has runs in {' and '.join(planned)}: say which, precision={planned[0]}"
        )
    return planned[0], f"that of the runs that {sweep.path} has"


def with_precision(argv: Sequence[str], precision: str) -> list[str]:
    """A command line with this precision in place of its own."""
    others = [text for text in argv if compose.parse_override(text.lstrip("+")).key_or_group != "precision"]
    return [*others, f"precision={precision}"]
