"""Where and how a run executes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from scaling.errors import InputError
from scaling.spec import RunSpec
from train.model.kernels import Attention, Compile, Recompute

if TYPE_CHECKING:
    from train.engine.stacked import Member


@dataclass(frozen=True)
class Host:
    """Where and how a run executes: nothing here is part of the run's identity."""

    device: str = "cpu"
    threads: int = 1
    """Threads of a CPU run. Results are bit for bit the same only at the same number."""
    micro_batch_tokens: int = 16384
    """Most tokens in one forward and backward pass; a larger batch accumulates gradients."""
    checkpoint_every_s: float = 20.0
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    progress: bool = False
    """A progress bar on stderr."""
    eval_points: int | None = None
    """Evaluations in the run; None: as many as its spec says."""
    layout: str = ""
    """Of a run on several ranks, as tensor=2,context=2; what it does not name is found."""
    compile: Compile = "none"
    """none | block | whole | auto: torch.compile of each layer, or of the model; auto: block on runs of over two minutes.
    It moves results by rounding, so the runs of a sweep share one setting."""
    attention: Attention = "auto"
    """auto | sdpa | flash3 | flash4: torch's own kernels, or FlashAttention-3 or 4; auto: the fastest that the GPU and its
    packages have (train.model.kernels). It moves results by rounding."""
    recompute: Recompute | Literal["budget"] = "none"
    """none | selective | full: what the backward pass computes again instead of keeping it; results are the same bits.
    budget: the least of it that fits (train.engine.memory), which may be full of the first layers alone."""
    recompute_layers: int | None = None
    """How many layers recompute, from the first on; None: all."""
    memory_budget_bytes: float | None = None
    """recompute=budget: of a training step; None: what the device has."""
    cuda_graphs: bool = False
    """The forward and backward pass as one CUDA graph (train.engine.graphs): pays where a GPU waits for its next kernel."""
    profile_steps: int = 0
    """Steps to profile, after the first few; 0: none."""
    member: Member | None = None
    """The run's place among runs that train as one (train.engine.stacked); None: it trains alone."""
    step_timeout_s: float = 180.0
    """Of a run on several ranks: one whose step, evaluation or checkpoint takes longer prints its stack and ends."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise InputError(f"threads = {self.threads}: must be at least 1")
        if self.memory_budget_bytes is not None and (self.recompute != "budget" or not self.memory_budget_bytes > 0):
            raise InputError(
                f"memory_budget_bytes = {self.memory_budget_bytes:g} with recompute={self.recompute}: a positive number of "
                "bytes, with recompute=budget"
            )


def check_one_process(spec: RunSpec, host: Host) -> None:
    """Refuse what several ranks cannot do.

    Raises:
        InputError: precision fp8, compile=whole, cuda_graphs.
    """
    fp8, whole = spec.precision == "fp8", host.compile == "whole"
    for is_set, setting, why, instead in (
        (fp8, "precision=fp8", "the scales of a sharded weight are not shared between its ranks", "precision=bf16"),
        (whole, "compile=whole", "the weights of each layer are gathered when it begins", "compile=block"),
        (host.cuda_graphs, "cuda_graphs", "collectives are not captured", "cuda_graphs=false"),
    ):
        if is_set:
            raise InputError(f"{setting} trains in one process alone, as {why}: use one rank, or {instead}")
