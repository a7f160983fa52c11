"""ENTRY python -m scaling.cost: what a training run takes in GPU-hours, days, money, energy and CO2e.

C = 6·N·D (Kaplan et al. 2020), or exactly for a shape; hours = C / (FLOP/s a device) / goodput; energy = hours × board
power. With a shape, the FLOP/s are those of the fastest layout that fits (scaling.layout).
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_type_hints

from scaling.accounting import count_params, flops_per_token
from scaling.derivation import derivation, summary
from scaling.errors import InputError, run_command, unknown
from scaling.goodput import goodput, goodput_range
from scaling.hardware import DEVICES, Device, find_device
from scaling.layout import PUBLIC_SHAPES, Plan, layout_values, plan
from scaling.recipe import STEPLAW
from scaling.shape import ModelShape
from scaling.spec import RunSpec
from scaling.steptime import ATTENTION_SHARE, Layout

TYPICAL_MFU = 0.4
"""Model FLOPs utilisation of a well-run large training job (Llama 3: .38 to .43)."""
GOODPUT = (0.85, 1.0, 1.0)
"""Share of the wall time that trains, where no plan predicts it: worst (Llama 3: 341 TFLOP/s over all its GPU-hours of
400 a step), the figure, best."""
BOARD_RANGE = (0.7, 1.3)
"""Draw at the meter over board power: a board below its limit in an efficient hall, one at its limit with host and PUE 1.3."""
LONG_RUN_S = 120.0
"""compile=auto and precision=auto change what trains a run that is expected to take longer than this."""
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


@dataclass(frozen=True)
class People:
    """Who works on a run, by what they cost with overhead."""

    count: float
    usd_per_year: float
    years: float

    @property
    def usd(self) -> float:
        return self.count * self.usd_per_year * self.years


def training_cost(
    flops: float,
    device: Device,
    devices: int = 1,
    flops_per_s: float | None = None,
    dtype: str = "bf16",
    kg_co2e_per_kwh: float | None = None,
    goodput: tuple[float, float, float] = GOODPUT,
    rate_range: tuple[float, float] = (1.0, 1.0),
) -> Cost:
    """Cost of `flops` training FLOPs on `devices` devices.

    Args:
        flops_per_s: of one device, as trained; None: TYPICAL_MFU of its peak in `dtype`.
        kg_co2e_per_kwh: grid carbon intensity; None: KG_CO2E_PER_KWH with its range.
        goodput: share of the wall time that trains: lowest, expected, highest.
        rate_range: lowest and highest flops_per_s, over flops_per_s.
    """
    rate = flops_per_s or TYPICAL_MFU * device.peak(dtype)
    step_hours = flops / rate / 3600
    high, hours, low = (step_hours / share for share in goodput)
    low, high = low / rate_range[1], high / rate_range[0]
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


def plan_cost(plan: Plan, tokens: float, kg_co2e_per_kwh: float | None = None) -> Cost:
    """Cost of training a plan's shape on `tokens`, at its predicted throughput and goodput. FLOPs are exact."""
    devices = plan.layout.devices
    worst, best = goodput_range(devices, plan.checkpoint_bytes)
    return training_cost(
        flops_per_token(plan.shape).train * tokens,
        plan.device,
        devices,
        plan.flops_per_s(),
        "bf16",
        kg_co2e_per_kwh,
        (worst, goodput(devices, plan.checkpoint_bytes).share, best),
        (plan.mfu_range[0] / plan.mfu(), plan.mfu_range[1] / plan.mfu()),
    )


def default_batch(tokens: float, seq_len: int, devices: int) -> int:
    """Sequences a step by Step Law's batch rule, as `divisible_batch` rounds them."""
    return divisible_batch(STEPLAW.batch_tokens(1.0, tokens, 1.0) / seq_len, devices)


def divisible_batch(sequences: float, devices: int) -> int:
    """Sequences a step, rounded to a power of two times the odd factor of `devices`.

    That factor must be in the batch for data parallelism to carry it; it is left out where it would double the batch.
    """
    odd = devices // (devices & -devices)
    odd = odd if odd < 2 * sequences else 1
    return odd * 2 ** max(0, round(math.log2(sequences / odd)))


def run_seconds(spec: RunSpec, device: Device, devices: int = 1) -> float:
    """Rough seconds of one run, evaluation and start-up included; of a branch, those after its branch point.

    On a CPU core the small models of a sweep reach 50 GFLOP/s · w/(w + 40), counting 6·N·D with body and head: measured
    20 at width 32, 30 to 45 for widths 48 to 128; element-wise work and overhead dominate below.
    """
    peak = device.peak(spec.precision)
    whole = 6.0 * spec.params.active("body_head") * spec.tokens + spec.eval_flops * spec.eval.points
    compute = whole * spec.trained_tokens / spec.tokens
    if device.name == "cpu":
        return 0.5 + compute / (50e9 * spec.shape.width / (spec.shape.width + 40)) / devices
    return 5.0 + compute / (TYPICAL_MFU * peak) / devices


def pool_seconds(seconds: Iterable[float], workers: int) -> float:
    """Wall time of jobs on a pool, the longest started first."""
    free = [0.0] * workers
    for job in sorted(seconds, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + job)
    return max(free)


EPILOG = """\
examples
  Llama 3 405B, as a lecture would estimate it: $52M of rent, $78M with 50 people for a year
    python -m scaling.cost --params 405e9 --tokens 15.6e12 --device h100 --devices 16000 --tflops 400 --people 50
  the layout that is fastest and fits, its step time, MFU and goodput, and how each figure comes about
    python -m scaling.cost --shape llama3-405b --tokens 15.6e12 --device h100 --devices 16384 --explain
  a layout of one's own
    python -m scaling.cost --shape llama3-405b --tokens 15.6e12 --devices 16384 --layout tensor=8,pipeline=16,context=1
  a device of one's own: bf16 TFLOP/s, GB, watts, rent an hour
    python -m scaling.cost --shape 4096,32,32,8,14336,128256 --tokens 1e12 --device mi300x:1307,192,750,2.5 --devices 64

FLOPs are 6·N·D, or exact with --shape (causal attention counted). Money is rent, at a contract price up to an on-demand
one; people are in it with --people. Failed experiments are not.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m scaling.cost",
        description="What a training run takes: GPU-hours, days, money, energy, CO2e, with ranges; with a shape, its "
        "parallel layout and step time too.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--params", type=float, metavar="N", help="parameters (active ones, for experts)")
    parser.add_argument("--tokens", type=float, metavar="D", help="training tokens")
    parser.add_argument("--flops", type=float, metavar="C", help="training FLOPs, instead of --params and --tokens")
    parser.add_argument(
        "--device",
        default="h100",
        help=f"{', '.join(DEVICES)} (default: h100; cpu is one core), or NAME:TFLOPS,GB,WATTS,USD",
    )
    parser.add_argument("--devices", type=int, default=1, metavar="K", help="how many of them (default: 1)")
    parser.add_argument("--tflops", type=float, help="TFLOP/s that one device reaches in training")
    parser.add_argument("--mfu", type=float, help=f"the same as a share of its peak (default: {TYPICAL_MFU})")
    parser.add_argument(
        "--dtype",
        default="bf16",
        help="of the peak that --mfu is a share of, or of a shape's matmuls: fp32, bf16, fp8",
    )
    parser.add_argument("--kg-co2e-per-kwh", type=float, metavar="X", help="grid carbon intensity (default: .24)")
    parser.add_argument("--usd-per-hour", type=float, metavar="P", help="rent of a device (default: the device's)")
    parser.add_argument("--people", type=float, metavar="K", help="people on the project, added to the rent")
    parser.add_argument("--usd-per-person-year", type=float, default=500e3, metavar="P", help="default: 500,000")
    parser.add_argument("--years", type=float, default=1.0, help="that the people work (default: 1)")
    cluster = parser.add_argument_group("a layout for a shape")
    cluster.add_argument("--shape", help=f"{', '.join(PUBLIC_SHAPES)}; or width,depth,heads,kv_heads,ff,vocab")
    cluster.add_argument("--seq-len", type=int, metavar="T", help="sequence length (default: the shape's, or 8192)")
    cluster.add_argument("--batch-tokens", type=float, metavar="B", help="tokens a step (default: Step Law's rule)")
    cluster.add_argument("--layout", metavar="NAME=VALUE,…", help=f"fix some of: {', '.join(get_type_hints(Layout))}")
    cluster.add_argument("--attention", default="flash3", help=f"kernel: {', '.join(ATTENTION_SHARE)}")
    parser.add_argument("--explain", action="store_true", help="print the derivation line by line, with sources")
    parser.add_argument("--json", choices=["-"], help="print one JSON object on stdout")
    return parser


POSITIVE = (
    *("params", "tokens", "flops", "devices", "tflops", "mfu", "kg_co2e_per_kwh", "usd_per_hour"),
    *("people", "usd_per_person_year", "years", "seq_len", "batch_tokens"),
)


def main(argv: Sequence[str]) -> None:
    """Parse, compute, print."""
    args = _parser().parse_args(argv)
    for name in POSITIVE:
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {value}: must be positive")
    device = find_device(args.device)
    if args.usd_per_hour:
        device = replace(device, usd_per_hour=(args.usd_per_hour, args.usd_per_hour))
    if args.shape:
        chosen, tokens = _plan(args, device)
        cost = plan_cost(chosen, tokens, args.kg_co2e_per_kwh)
    else:
        chosen, cost = None, _plain_cost(args, device)
    people = People(args.people, args.usd_per_person_year, args.years) if args.people else None
    if args.json:
        print(json.dumps(_json(cost, chosen, people)))
        return
    print(describe(cost, device, args.devices, people))
    if chosen:
        print("\n".join(summary(chosen)))
    if args.explain:
        print("\nderivation\n" + "\n".join(explain(cost, device, args.devices, chosen, args.kg_co2e_per_kwh)))


def _plain_cost(args: argparse.Namespace, device: Device) -> Cost:
    for name in ("seq_len", "batch_tokens", "layout"):
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: lays out a shape: give --shape too")
    if args.tflops and args.mfu:
        raise InputError(f"--tflops {args.tflops} and --mfu {args.mfu} say the same thing twice: give one")
    if (args.flops is None) == (args.params is None and args.tokens is None):
        raise InputError("give either --params N and --tokens D, or --flops C")
    if args.flops is None and (args.params is None or args.tokens is None):
        raise InputError("--params and --tokens go together: C = 6·N·D needs both")
    peak = device.peak(args.dtype)
    rate = args.tflops * 1e12 if args.tflops else args.mfu and args.mfu * peak
    if rate and rate > peak:
        raise InputError(
            f"{rate / 1e12:g} TFLOP/s is above the {device.name}'s peak of {peak / 1e12:g} in {args.dtype}: give less"
        )
    flops = args.flops or 6.0 * args.params * args.tokens
    return training_cost(flops, device, args.devices, rate, args.dtype, args.kg_co2e_per_kwh)


def _plan(args: argparse.Namespace, device: Device) -> tuple[Plan, float]:
    """The plan that the arguments ask for, and the training tokens."""
    if args.tflops or args.mfu:
        raise InputError("--shape predicts the FLOP/s: leave out --tflops and --mfu")
    device.peak(args.dtype)
    if args.dtype == "fp32":
        raise InputError("--dtype fp32 with --shape: layouts are planned in bf16 or fp8")
    if args.attention not in ATTENTION_SHARE:
        raise unknown("attention kernel", args.attention, ATTENTION_SHARE)
    shape = _shape(args.shape, args.seq_len)
    total = count_params(shape).total
    if args.params and not 0.95 < args.params / total < 1.05:
        raise InputError(
            f"--params {args.params:g}: the shape has {total:.4g}; leave out --params or change the shape"
        )
    if (args.tokens is None) == (args.flops is None):
        raise InputError("give --tokens D or --flops C with --shape, not both")
    tokens = args.tokens or args.flops / flops_per_token(shape).train
    batch = default_batch(tokens, shape.seq_len, args.devices)
    if args.batch_tokens:
        batch = max(1, round(args.batch_tokens / shape.seq_len))
    fixed = layout_values(args.layout) if args.layout else None
    return plan(shape, device, args.devices, batch, args.dtype, args.attention, fixed), tokens


def _shape(text: str, seq_len: int | None) -> ModelShape:
    if text in PUBLIC_SHAPES:
        shape = PUBLIC_SHAPES[text]
    elif "," not in text:
        raise unknown("shape", text, [*PUBLIC_SHAPES, "width,depth,heads,kv_heads,ff,vocab"])
    else:
        try:
            width, depth, heads, kv_heads, ff, vocab = (int(number) for number in text.split(","))
        except ValueError:
            raise InputError(
                f"--shape {text}: give six whole numbers, width,depth,heads,kv_heads,ff,vocab, "
                f"or one of {', '.join(PUBLIC_SHAPES)}"
            ) from None
        if kv_heads < 1:
            raise InputError(f"--shape {text}: kv_heads must be at least 1")
        shape = ModelShape(width, depth, heads, ff, vocab, 8192, n_kv_heads=kv_heads, qk_norm=False)
    return replace(shape, seq_len=seq_len) if seq_len else shape


def _json(cost: Cost, chosen: Plan | None, people: People | None) -> dict[str, Any]:
    out = {**vars(cost), "ranges": {name: list(span) for name, span in cost.ranges.items()}}
    if people is not None:
        out |= {"people_usd": people.usd, "total_usd": cost.cost_usd + people.usd}
    if chosen is not None:
        running = goodput(chosen.layout.devices, chosen.checkpoint_bytes)
        out |= {
            "layout": vars(chosen.layout),
            "batch_tokens": chosen.batch * chosen.shape.seq_len,
            "step_time_s": chosen.step.total,
            "step_terms_s": vars(chosen.step),
            "memory_gb": chosen.memory.total / 1e9,
            "mfu_range": list(chosen.mfu_range),
            "mfu_full_attention": chosen.mfu(causal=False),
            "goodput": running.share,
            "checkpoint_interval_s": running.interval,
        }
    return out


def describe(cost: Cost, device: Device, devices: int, people: People | None = None) -> str:
    """A table for a reader."""
    unit = {"gpu_hours": "GPU-hours", "days": "days", "energy_mwh": "MWh", "co2e_t": "t CO2e", "cost_usd": "USD"}
    lines = [
        f"{cost.flops:.3g} FLOPs on {devices:,} × {device.name} at {cost.tflops_per_device:.3g} TFLOP/s "
        f"({cost.mfu:.1%} of the dense peak)"
    ]
    for name, (low, high) in cost.ranges.items():
        lines.append(f"{unit[name]:>10} {_figure(getattr(cost, name)):>14}   {_figure(low)} to {_figure(high)}")
    if people is not None:
        lines.append(
            f"{'with people':>10} {_figure(cost.cost_usd + people.usd):>13}   {people.count:g} people × "
            f"{people.usd_per_year:,.0f} USD × {people.years:g} y = {_figure(people.usd)} USD more"
        )
    return "\n".join(lines)


def explain(
    cost: Cost, device: Device, devices: int, chosen: Plan | None, kg_co2e_per_kwh: float | None
) -> list[str]:
    """How each figure comes about: formula, numbers, result, and where the constants are from."""
    share = goodput(devices, chosen.checkpoint_bytes).share if chosen else GOODPUT[1]
    carbon = kg_co2e_per_kwh or KG_CO2E_PER_KWH[1]
    rent, demand = device.usd_per_hour
    counted = "exact, causal attention, × tokens (scaling/accounting.py)" if chosen else "6·N·D (Kaplan et al. 2020)"
    return [
        f"  C = {counted} = {cost.flops:.4g} FLOPs = {cost.flops / 8.64e19:,.4g} PF-days",
        *(derivation(chosen) if chosen else []),
        f"  GPU-hours = C / {cost.tflops_per_device:.4g} TFLOP/s / 3600 / goodput {share:.4g} = {cost.gpu_hours:,.0f}",
        f"  days = GPU-hours / {devices:,} / 24 = {cost.days:.4g}",
        f"  energy = GPU-hours × {device.watts:g} W board power (data sheet) = {cost.energy_mwh:,.4g} MWh; range "
        f"× {BOARD_RANGE[0]:g} to {BOARD_RANGE[1]:g}: a board below its limit; at it, with host and cooling",
        f"  CO2e = energy × {carbon:g} kg/kWh = {cost.co2e_t:,.4g} t; grids: {KG_CO2E_PER_KWH[0]:g} hydro or nuclear, "
        f"{KG_CO2E_PER_KWH[1]:g} a large US operator, {KG_CO2E_PER_KWH[2]:g} world average",
        f"  rent = GPU-hours × {rent:g} USD (contract; on demand {demand:g}) = {cost.cost_usd:,.0f} USD",
    ]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    run_command(main)
