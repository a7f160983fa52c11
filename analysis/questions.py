"""Flags of analysis.fit that say what may be spent and what bounds the answer; what they come to in FLOPs and Limits."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from analysis.decide.allocate import as_counted
from analysis.decide.answer import Answer
from analysis.decide.limits import Limits, params_in_memory, params_in_time
from analysis.inference import FitResult
from analysis.inference.repetition import Repetition
from analysis.runs import Runs
from scaling.errors import InputError
from scaling.hardware import DEVICES, Device, find_device

if TYPE_CHECKING:
    from scaling.cost import Cost

HELP = """Budgets and limits:
  "how sure that is" gives the 90% interval of N* over laws and resamples; every N within .1% of the least loss: take the cheaper
  to serve; and the loss given up by this N if the exponents are those of either end of the interval.
  --budget, --gpu-hours and --usd are one thing in three units; a GPU-hour is MFU × the device's dense bf16 peak × 3600 FLOPs.
  --served-tokens makes the budget one of training and serving together: smaller and longer than Chinchilla's optimum
  (Sardana et al. 2023). In FLOPs a served token takes a third of a trained one; --serve-mfu weighs it in money instead,
  since decoding reaches a few percent where training reaches 40.
  --unique-tokens lets data repeat at the worth that repetition has: the runs' own where some of them repeat their text
  (+grid=repeats), else Muennighoff et al. 2023's (4 epochs cost little, 16 are the end). Two limits that choose the same thing, or that no N keeps at once, are refused by name."""

_POSITIVE = (
    *("gpu_hours", "usd", "devices", "usd_per_hour", "mfu", "max_params", "max_active_params", "serve_memory_gb"),
    *(
        "serve_ms_per_token",
        "serve_devices",
        "bytes_per_param",
        "unique_tokens",
        "max_epochs",
        "served_tokens",
        "serve_mfu",
        "overtrain",
    ),
    "tokens_per_param",
)


@dataclass(frozen=True)
class Money:
    """What FLOPs cost on a device."""

    device: Device
    devices: int
    mfu: float

    def cost(self, flops: float) -> Cost:
        """GPU-hours, days, rent and the rest."""
        from scaling.cost import training_cost  # with the layout planner: only when money is asked about

        return training_cost(flops, self.device, self.devices, self.mfu * self.device.peak("bf16"))

    def flops(self, gpu_hours: float) -> float:
        """What so many hours of one device train."""
        return gpu_hours * 3600 * self.mfu * self.device.peak("bf16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The groups of budget and limits."""
    spent = parser.add_argument_group("what may be spent, beside --budget")
    add = spent.add_argument
    add("--gpu-hours", type=float, metavar="H", help="budget in hours of --device, instead of --budget")
    add("--usd", type=float, metavar="M", help="budget in rent of --device, instead of --budget")
    add(
        "--device",
        metavar="NAME",
        help=f"{', '.join(DEVICES)} or NAME:TFLOPS,GB,WATTS,USD (default h100 where one is needed)",
    )
    add(
        "--devices",
        type=int,
        metavar="K",
        help="plan the cluster too: shape, layout, days and money on K of --device",
    )
    add("--usd-per-hour", type=float, metavar="P", help="rent of a device (default: its contract price)")
    add("--mfu", type=float, help="share of the peak that training reaches (default: scaling.cost's typical one, .4)")
    limits = parser.add_argument_group("limits that the answer keeps")
    add = limits.add_argument
    add("--max-params", type=float, metavar="N", help="largest N")
    add("--max-active-params", type=float, metavar="N", help="most parameters that a token meets (with experts)")
    add("--serve-memory-gb", type=float, metavar="GB", help="all weights fit 70%% of this memory, every expert's too")
    add(
        "--serve-ms-per-token",
        type=float,
        metavar="T",
        help="--serve-devices read in this time the weights that a token meets",
    )
    add("--serve-devices", type=int, default=1, metavar="K", help="devices that serve one copy (default 1)")
    add("--bytes-per-param", type=float, default=2.0, metavar="B", help="of a served weight (default 2: bf16)")
    add("--unique-tokens", type=float, metavar="U", help="different tokens at hand; beyond them they repeat")
    add("--max-epochs", type=float, metavar="E", help="read them at most so often")
    add("--served-tokens", type=float, metavar="T", help="tokens served over the model's life, paid from the budget")
    add(
        "--serve-mfu",
        type=float,
        help="weigh serving in money: share of the peak that serving reaches (decoding: .01)",
    )
    add("--overtrain", type=float, metavar="F", help="D/N is F times the compute-optimal one")
    add("--tokens-per-param", type=float, metavar="R", help="D/N")
    add(
        "--experts",
        nargs="+",
        metavar="E",
        help="with --law experts: of these numbers of experts (1: dense; auto: those of the runs) the one of least loss",
    )


def check(args: argparse.Namespace) -> None:
    """Refuse numbers that are not positive, and budgets given twice.

    Raises:
        InputError: names the flags.
    """
    for name in _POSITIVE:
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')} {value:g}: must be positive")
    for name in ("mfu", "serve_mfu"):
        if (getattr(args, name) or 0) > 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name):g}: a share of the peak, at most 1")
    given = [f"--{n.replace('_', '-')}" for n in ("budget", "gpu_hours", "usd") if getattr(args, n) is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} conflict: each is a budget; give one")
    if bad := [e for e in args.experts or () if e != "auto" and not (e.isdecimal() and int(e) > 0)]:
        raise InputError(f"--experts {bad[0]}: give whole numbers from 1 on, or auto")
    if args.serve_mfu and not args.served_tokens:
        raise InputError(f"--serve-mfu {args.serve_mfu:g}: of what? give --served-tokens too")


def money(args: argparse.Namespace) -> Money:
    """Device, number, MFU and rent that were asked for."""
    from scaling.cost import TYPICAL_MFU

    device = find_device(args.device or "h100")
    if args.usd_per_hour:
        device = replace(device, usd_per_hour=(args.usd_per_hour, args.usd_per_hour))
    return Money(device, args.devices or 1, args.mfu or TYPICAL_MFU)


def budgets(args: argparse.Namespace, default_flops: float) -> list[float]:
    """The budgets in FLOPs."""
    if args.gpu_hours is not None:
        return [money(args).flops(args.gpu_hours)]
    if args.usd is not None:
        spender = money(args)
        return [spender.flops(args.usd / spender.device.usd_per_hour[0])]
    return list(args.budget) if args.budget else [default_flops]


def limits(args: argparse.Namespace, fit: FitResult, runs: Runs, worth: Repetition | None = None) -> Limits:
    """The limits that were asked for, N in the fit's convention.

    Args:
        worth: of repeated tokens, where the runs tell it.
    """
    known = worth if args.unique_tokens else None
    caps = [(args.max_params, "--max-params")] if args.max_params else []
    family = runs.plan.family if runs.plan is not None else None
    most = {"--max-active-params": args.max_active_params}
    if args.serve_memory_gb:
        most["--serve-memory-gb"] = params_in_memory(args.serve_memory_gb * 1e9, args.bytes_per_param)
    if args.serve_ms_per_token:
        bandwidth = money(args).device.bandwidth * args.serve_devices
        most["--serve-ms-per-token"] = params_in_time(args.serve_ms_per_token / 1e3, bandwidth, args.bytes_per_param)
    for flag, params in most.items():
        if params:
            caps.append((as_counted(fit, family, params, flag, active=flag != "--serve-memory-gb"), flag))
    smallest, source = min(caps, default=(None, "max_params"))
    return Limits(
        max_params=smallest,
        max_params_source=source,
        unique_tokens=args.unique_tokens,
        r_tokens=None if known is None else known.r_tokens,
        r_tokens_95=None if known is None else known.interval_95,
        max_epochs=args.max_epochs,
        served_tokens=args.served_tokens or 0.0,
        serving_weight=money(args).mfu / args.serve_mfu if args.serve_mfu else 1.0,
        tokens_per_param=args.tokens_per_param,
        overtrain=args.overtrain,
    )


def with_experts(args: argparse.Namespace, said: Answer) -> Answer:
    """The answer with the number of experts that was asked about, or with why this fit cannot tell.

    Raises:
        InputError: runs or budgets that the law experts cannot be asked about.
    """
    if args.experts is None:
        return said
    if "experts" not in said.fit.surface.variables:
        reason = (
            f"--experts {' '.join(args.experts)}: the law {said.fit.law} has no number of experts, so this fit cannot tell which is "
            "best; python -m scaling.sweep +grid=experts measures several beside the dense model, and --law experts fits them"
        )
        return replace(said, warnings=(*said.warnings, reason))
    from analysis.decide.experts import choose_experts

    in_sweep = sorted({int(e) for e in said.runs.table["experts"]}) if "experts" in said.runs.table else [1]
    counts = [n for e in args.experts for n in (in_sweep if e == "auto" else [int(e)])]
    total = (
        params_in_memory(args.serve_memory_gb * 1e9, args.bytes_per_param) if args.serve_memory_gb else float("inf")
    )
    active = args.max_active_params or float("inf")
    if args.serve_ms_per_token:
        bandwidth = money(args).device.bandwidth * args.serve_devices
        active = min(active, params_in_time(args.serve_ms_per_token / 1e3, bandwidth, args.bytes_per_param))
    bounds = min(total, args.max_params or float("inf")), active
    return replace(said, experts=tuple(choose_experts(said.fit, said.runs, c, counts, *bounds) for c in said.budgets))


def priced(args: argparse.Namespace, said: Answer) -> Answer:
    """The answer with what training costs, and the plan of the first budget, where devices or money were asked about.

    Raises:
        InputError: devices without an allocation, or that cannot hold the model.
    """
    if not (args.device or args.devices or args.usd or args.gpu_hours):
        return said
    spender = money(args)
    costs = tuple(spender.cost(a.train_flops) for a in said.allocations)
    if args.devices is None:
        return replace(said, costs=costs)
    from analysis.decide.cluster import make_plan

    if not said.allocations:
        raise InputError(f"--devices {args.devices}: there is no N* to plan for: {said.warnings[-1]}")
    plan = make_plan(said.fit, said.runs, said.allocations[0], spender.device, args.devices, said.limits)
    return replace(said, costs=costs, plan=plan)
