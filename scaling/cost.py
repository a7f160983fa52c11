"""ENTRY python -m scaling.cost: what a training run takes in GPU-hours, days, money, energy and CO2e.

C = 6·N·D (Kaplan et al. 2020); hours = C / (FLOP/s a device) / devices; energy = hours × board power × PUE.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scaling.errors import InputError, run_command
from scaling.hardware import DEVICES, Device, find_device
from scaling.spec import RunSpec

TYPICAL_MFU = 0.4
"""Model FLOPs utilisation of a well-run large training job (Llama 3: .38 to .43)."""
GOODPUT_RANGE = (0.85, 1.0)
"""Share of the wall time that trains: restarts, stragglers and evaluation take the rest (Llama 3, all-in: .85)."""
BOARD_RANGE = (0.7, 1.3)
"""Draw at the meter over board power: a board below its limit in an efficient hall, one at its limit with host and PUE 1.3."""
KG_CO2E_PER_KWH = (0.05, 0.24, 0.5)
"""Grid carbon intensity: hydro or nuclear; the .24 of a large US operator; a world-average grid."""


@dataclass(frozen=True)
class Cost:
    """What a run takes, each figure with the range of what is not known."""

    flops: float
    gpu_hours: float
    days: float
    energy_mwh: float
    co2e_t: float
    cost_usd: float
    """At the contract price."""
    tflops_per_device: float
    mfu: float
    """FLOP/s over the device's dense peak."""
    ranges: dict[str, tuple[float, float]]


def training_cost(
    flops: float,
    device: Device,
    devices: int = 1,
    flops_per_s: float | None = None,
    dtype: str = "bf16",
    kg_co2e_per_kwh: float | None = None,
) -> Cost:
    """Cost of `flops` training FLOPs on `devices` devices.

    Args:
        flops_per_s: of one device, as trained; None: TYPICAL_MFU of its peak in `dtype`.
        kg_co2e_per_kwh: grid carbon intensity; None: KG_CO2E_PER_KWH with its range.
    """
    rate = flops_per_s or TYPICAL_MFU * device.peak(dtype)
    hours = flops / rate / 3600
    low, high = hours / GOODPUT_RANGE[1], hours / GOODPUT_RANGE[0]
    energy_mwh = hours * device.watts / 1e6
    energy = (low * device.watts * BOARD_RANGE[0] / 1e6, high * device.watts * BOARD_RANGE[1] / 1e6)
    carbon = KG_CO2E_PER_KWH if kg_co2e_per_kwh is None else (kg_co2e_per_kwh,) * 3
    return Cost(
        flops=flops,
        gpu_hours=hours,
        days=hours / devices / 24,
        energy_mwh=energy_mwh,
        co2e_t=energy_mwh * carbon[1],
        cost_usd=hours * device.usd_per_hour[0],
        tflops_per_device=rate / 1e12,
        mfu=rate / device.peak(dtype),
        ranges={
            "gpu_hours": (low, high),
            "days": (low / devices / 24, high / devices / 24),
            "energy_mwh": energy,
            "co2e_t": (energy[0] * carbon[0], energy[1] * carbon[2]),
            "cost_usd": (low * device.usd_per_hour[0], hours * device.usd_per_hour[1]),
        },
    )


def run_seconds(spec: RunSpec, device: Device, devices: int = 1) -> float:
    """Rough seconds of one run, evaluation and start-up included; of a branch, those after its branch point.

    On a CPU core the small models of a sweep reach 50 GFLOP/s · w/(w + 40), counting 6·N·D with body and head: measured
    20 at width 32, 30 to 45 for widths 48 to 128; element-wise work and overhead dominate below.
    """
    whole = 6.0 * spec.params.body_head * spec.tokens + spec.eval_flops * spec.eval.points
    compute = whole * spec.trained_tokens / spec.tokens
    if device.name == "cpu":
        return 0.5 + compute / (50e9 * spec.shape.width / (spec.shape.width + 40)) / devices
    return 5.0 + compute / (TYPICAL_MFU * device.peak(spec.precision)) / devices


def pool_seconds(seconds: Iterable[float], workers: int) -> float:
    """Wall time of jobs on a pool, the longest started first."""
    free = [0.0] * workers
    for job in sorted(seconds, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + job)
    return max(free)


EPILOG = """\
example: Llama 3 405B, as a lecture would estimate it
  python -m scaling.cost --params 405e9 --tokens 15.6e12 --device h100 --devices 16000 --tflops 400

FLOPs are 6·N·D. Money is rent, at a contract price up to an on-demand one; people and failed experiments are not in it.
The FLOP/s of a model step (--tflops, --mfu) is not the goodput: restarts and stalls take up to 15% more hours.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m scaling.cost",
        description="What a training run takes: GPU-hours, days, money, energy, CO2e, with ranges.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--params", type=float, metavar="N", help="parameters (active ones, for experts)")
    parser.add_argument("--tokens", type=float, metavar="D", help="training tokens")
    parser.add_argument("--flops", type=float, metavar="C", help="training FLOPs, instead of --params and --tokens")
    parser.add_argument("--device", default="h100", help=f"{', '.join(DEVICES)} (default: h100; cpu is one core)")
    parser.add_argument("--devices", type=int, default=1, metavar="K", help="how many of them (default: 1)")
    parser.add_argument("--tflops", type=float, help="TFLOP/s that one device reaches in training")
    parser.add_argument("--mfu", type=float, help=f"the same as a share of its peak (default: {TYPICAL_MFU})")
    parser.add_argument(
        "--dtype", default="bf16", help="whose peak --mfu is a share of: fp32, bf16, fp8 (default: bf16)"
    )
    parser.add_argument("--kg-co2e-per-kwh", type=float, metavar="X", help="grid carbon intensity (default: .24)")
    parser.add_argument("--json", choices=["-"], help="print one JSON object on stdout")
    return parser


def main(argv: Sequence[str]) -> None:
    """Parse, compute, print."""
    args = _parser().parse_args(argv)
    for name in ("params", "tokens", "flops", "devices", "tflops", "mfu", "kg_co2e_per_kwh"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be positive")
    if args.tflops and args.mfu:
        raise InputError(f"--tflops {args.tflops} and --mfu {args.mfu} say the same thing twice: give one")
    if (args.flops is None) == (args.params is None and args.tokens is None):
        raise InputError("give either --params N and --tokens D, or --flops C")
    if args.flops is None and (args.params is None or args.tokens is None):
        raise InputError("--params and --tokens go together: C = 6·N·D needs both")
    device = find_device(args.device)
    peak = device.peak(args.dtype)
    rate = args.tflops * 1e12 if args.tflops else args.mfu and args.mfu * peak
    if rate and rate > peak:
        raise InputError(
            f"{rate / 1e12:g} TFLOP/s is above the {device.name}'s peak of {peak / 1e12:g} in {args.dtype}: give less"
        )
    flops = args.flops or 6.0 * args.params * args.tokens
    cost = training_cost(flops, device, args.devices, rate, args.dtype, args.kg_co2e_per_kwh)
    print(json.dumps(_json(cost)) if args.json else describe(cost, device, args.devices))


def _json(cost: Cost) -> dict[str, Any]:
    return {**vars(cost), "ranges": {name: list(span) for name, span in cost.ranges.items()}}


def describe(cost: Cost, device: Device, devices: int) -> str:
    """A table for a reader."""
    unit = {"gpu_hours": "GPU-hours", "days": "days", "energy_mwh": "MWh", "co2e_t": "t CO2e", "cost_usd": "USD"}
    lines = [
        f"{cost.flops:.3g} FLOPs on {devices:,} × {device.name} at {cost.tflops_per_device:.3g} TFLOP/s "
        f"({cost.mfu:.1%} of the dense peak)"
    ]
    for name, (low, high) in cost.ranges.items():
        lines.append(f"{unit[name]:>10} {_figure(getattr(cost, name)):>14}   {_figure(low)} to {_figure(high)}")
    return "\n".join(lines)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    run_command(main)
