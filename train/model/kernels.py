"""How a model is run, none of which is part of what it computes but for rounding: compilation, recomputation, kernels."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from scaling.cost import LONG_RUN_S
from scaling.errors import InputError
from scaling.shape import ModelShape

if TYPE_CHECKING:
    from train.model.decoder import Decoder

Compile = Literal["none", "block", "whole", "auto"]
Recompute = Literal["none", "selective", "full"]

ATTENTION = frozenset(
    (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
    )
)
"""Operators that attention calls, by name: the last exists from its first call on. Other kernels stand behind the same ones."""
Attention = Literal["auto", "sdpa", "flash3", "flash4"]


class Flash(NamedTuple):
    """Kernels that torch calls in place of its own flash attention."""

    implementation: str
    """Its name in torch.nn.attention."""
    module: str
    """What has to be importable."""
    capabilities: tuple[int, ...]
    """Major compute capabilities that it runs on."""


FLASH: Mapping[str, Flash] = {
    "flash3": Flash("FA3", "flash_attn_interface", (9,)),
    "flash4": Flash("FA4", "flash_attn.cute.interface", (9, 10)),
}
BEST: Mapping[int, Literal["flash3", "flash4"]] = {9: "flash3", 10: "flash4"}
"""What attention=auto takes on a major compute capability: FlashAttention-3 is for Hopper (Shah et al. 2024, arXiv 2407.08608)."""
_activation = threading.Lock()
"""Runs that train as one set up in threads."""


def _keep_attention_and_half_of_the_products() -> Any:
    """What selective recomputation keeps: attention's outputs, and every second matrix product's (torchtitan's rule)."""
    products = {True: 0, False: 0}

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if op.name() in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op is torch.ops.aten.mm.default:
            products[context.is_recompute] += 1
            if products[context.is_recompute] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def recomputed(forward: Callable[..., Tensor], recompute: Recompute) -> Callable[..., Tensor]:
    """A layer's forward whose values the backward pass computes again, as `set_up` says."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute == "selective":
        options["context_fn"] = _keep_attention_and_half_of_the_products

    def run(*args: Any) -> Tensor:
        out: Tensor = checkpoint(forward, *args, **options)
        return out

    return run


def set_up(model: Decoder, compiled: Compile, recompute: Recompute, layers: int | None = None) -> None:
    """Recompute and compile a model's layers, in place. Evaluation should run under `torch.compiler.set_stance("force_eager")`.

    Args:
        compiled: none; block: each layer, once for all of them; whole: embedding to final norm in one graph.
        recompute: what the backward pass computes again: none; selective: all but attention's and half of the matrix
            products' outputs; full: each layer from its input.
        layers: how many layers recompute, from the first on; None: all.
    Raises:
        InputError: experts, whose shapes follow the data, with compilation.
    """
    assert compiled != "auto", "resolved by the caller"
    if compiled != "none" and model.shape.experts:
        raise InputError(f"compile={compiled}: the shapes of experts follow the data: use compile=none")
    for number, layer in enumerate(model.model.layers):
        if recompute != "none" and (layers is None or number < layers):
            layer.forward = recomputed(layer.forward, recompute)
        if compiled == "block":
            layer.compile(dynamic=False)
    if compiled == "whole":
        model.hidden = torch.compile(model.hidden, dynamic=False)  # type: ignore[method-assign]


def choose(compiled: Compile, expected_s: float, shape: ModelShape) -> tuple[Compile, str]:
    """compile=auto decided, the same on every start of a run, with the reason; another setting is as it is."""
    if compiled != "auto":
        return compiled, "asked for"
    if shape.experts:
        return "none", "the shapes of experts follow the data"
    if expected_s <= LONG_RUN_S:
        return "none", f"about {expected_s:.0f} s, and compiling pays from {LONG_RUN_S:.0f} s on"
    return "block", f"about {expected_s:.0f} s, longer than {LONG_RUN_S:.0f} s"


def importable(kernels: str) -> bool:
    """Whether the package of one of FLASH can be imported, and this torch knows what to do with it."""
    from torch.nn import attention

    if FLASH[kernels].implementation not in getattr(attention, "list_flash_attention_impls", list)():
        return False
    try:
        importlib.import_module(FLASH[kernels].module)
    except (ImportError, OSError, RuntimeError):  # absent, or built for another torch or CUDA
        return False
    return True


def choose_attention(
    asked: Attention, capability: tuple[int, int] | None, dtype: torch.dtype, present: Collection[str]
) -> tuple[Attention, str]:
    """attention=auto decided, with the reason; another setting is as it is.

    Args:
        capability: the device's compute capability; None: it is no CUDA device.
        dtype: of queries, keys and values.
        present: those of FLASH that are `importable`.
    Returns:
        sdpa (torch's own kernels), or one of FLASH.
    Raises:
        InputError: kernels are asked for that the device, the precision or the packages do not have.
    """
    if asked == "sdpa":
        return asked, "asked for"
    kernels = BEST.get(capability[0] if capability else 0) if asked == "auto" else asked
    if capability is None:
        missing = "the device is not a CUDA GPU"
    elif kernels is None or capability[0] not in FLASH[kernels].capabilities:
        missing = f"there are none for compute capability {capability[0]}.{capability[1]}"
    elif dtype == torch.float32:
        missing = "they take no fp32"
    elif kernels not in present:
        missing = f"{FLASH[kernels].module} cannot be imported"
    else:
        return kernels, f"compute capability {capability[0]}.{capability[1]}" if asked == "auto" else "asked for"
    if asked != "auto":
        raise InputError(f"attention={asked}: {missing}: use attention=sdpa, which is torch's own, or attention=auto")
    return "sdpa", missing


def use_attention(kernels: Attention) -> None:
    """Have this process's attention run on these kernels; cuDNN's, which torch may prefer, are then off."""
    from torch.nn import attention

    wanted = None if kernels == "sdpa" else FLASH[kernels].implementation
    with _activation:
        now = getattr(attention, "current_flash_attention_impl", lambda: None)()
        if now == wanted:
            return
        if wanted is None:
            attention.restore_flash_attention_impl()
        else:
            attention.activate_flash_attention_impl(wanted)
        torch.backends.cuda.enable_cudnn_sdp(wanted is None)
