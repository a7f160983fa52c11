"""What compile=auto and attention=auto come to for a run, which is said."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from scaling.cost import run_seconds
from scaling.hardware import find_device, match_device
from scaling.shape import ModelShape
from scaling.spec import RunSpec
from train.engine.host import Host
from train.model.attention import capability_of
from train.model.kernels import FLASH, Attention, Compile, choose, choose_attention, importable, use_attention
from train.model.precision import compute_dtype

if TYPE_CHECKING:
    from train.engine.parallel.world import World


def chosen_compile(
    spec: RunSpec, host: Host, shape: ModelShape, world: World | None, uncompiled: str | None = None
) -> Compile:
    """What is compiled.

    Args:
        uncompiled: why the model cannot be; None: it can.
    """
    expected_s = 0.0
    device = torch.device(host.device)
    if host.compile == "auto":
        description = torch.cuda.get_device_name() if device.type == "cuda" else device.type
        ranks = 1 if world is None else world.size
        expected_s = run_seconds(spec, match_device(description) or find_device("h100")) / ranks
    compiled, why = choose(host.compile, expected_s, shape)
    if host.compile == "auto":
        if compiled != "none" and uncompiled:
            compiled, why = "none", uncompiled
        if world is None or world.leads:
            print(f"run {spec.run_id}: compile={compiled}: {why}", file=sys.stderr)
    return compiled


def attention_on(device: torch.device, asked: Attention, dtype: torch.dtype) -> tuple[Attention, str]:
    """`choose_attention` by what this machine has."""
    capability = capability_of(device)
    present = [] if capability is None else [kernels for kernels in FLASH if importable(kernels)]
    return choose_attention(asked, capability, dtype, present)


def set_attention(spec: RunSpec, host: Host, world: World | None) -> None:
    """Have this process compute attention as the host asks; said where a GPU leaves a choice.

    Raises:
        InputError: the kernels that are asked for cannot be had.
    """
    device = torch.device(host.device)
    kernels, why = attention_on(device, host.attention, compute_dtype(spec.precision))
    if device.type == "cuda" and host.attention == "auto" and (world is None or world.leads):
        print(f"run {spec.run_id}: attention={kernels}: {why}", file=sys.stderr)
    use_attention(kernels)
