"""How a model is run, none of which is part of what it computes but for rounding: compilation and recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

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

_aten = torch.ops.aten
ATTENTION = frozenset(
    getattr(_aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)


def _keep_attention_and_half_of_the_products() -> Any:
    """What selective recomputation keeps: attention's outputs, and every second matrix product's (torchtitan's rule)."""
    products = {True: 0, False: 0}

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if op in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op is _aten.mm.default:
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
