"""What every launcher tells the processes that train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scaling.errors import InputError


@dataclass(frozen=True)
class WorkerSettings:
    """How the workers of a launch train; nothing here is part of a run's identity."""

    threads: int = 1
    """CPU threads of one worker."""
    max_attempts: int = 3
    """Failures of one run before this launch gives it up; the next launch tries again."""
    checkpoint_every_s: float = 20.0
    """Seconds between a run's checkpoints: the most work that a kill costs."""
    micro_batch_tokens: int = 16384
    """Most tokens in one forward and backward pass; a run that does not fit halves it for itself."""
    compile: Literal["none", "block", "whole", "auto"] = "none"
    """torch.compile of each layer, or of the model: one setting for all runs, as it moves results by rounding; auto: of each
    layer in the runs that are expected to take over two minutes."""
    attention: Literal["auto", "sdpa", "flash3", "flash4"] = "auto"
    """Attention's kernels: torch's own, FlashAttention-3 or 4; auto: the best that a GPU and its packages have."""
    recompute: Literal["none", "selective", "full", "budget"] = "none"
    """What the backward pass computes again, to save memory; budget: the least of it that fits memory_budget_bytes."""
    memory_budget_bytes: float | None = None
    """recompute=budget: memory of one worker's training step; None: all that the device has."""
    cuda_graphs: bool = False
    """The forward and backward pass as one CUDA graph: pays for small models, which a GPU runs faster than they are started."""
    share: Literal["plain", "processes", "stacked"] = "plain"
    """How small runs share a GPU: one at a time; share_runs processes; share_runs runs of one shape and batch as one."""
    share_runs: int = 8

    def __post_init__(self) -> None:
        self.check_least(threads=1, max_attempts=1, micro_batch_tokens=1, share_runs=1, checkpoint_every_s=0)

    def check_least(self, **least: int) -> None:
        """Refuse settings below the least that they may be.

        Raises:
            InputError: names the setting, its value and the least.
        """
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and not value >= lowest:
                raise InputError(f"launcher.{name} = {value}: must be at least {lowest}")

    def options(self, device: str, layout: str = "") -> list[str]:
        """A worker's options for these settings; layout: of a run on several ranks."""
        options: dict[str, object] = {
            "--device": device,
            "--threads": self.threads,
            "--max-attempts": self.max_attempts,
            "--checkpoint-every": self.checkpoint_every_s,
            "--micro-batch-tokens": self.micro_batch_tokens,
        }
        options |= {
            f"--{name}": value for name in ("compile", "recompute") if (value := getattr(self, name)) != "none"
        }
        if self.attention != "auto":
            options["--attention"] = self.attention
        if layout:
            options["--layout"] = layout
        if self.memory_budget_bytes is not None:
            options["--memory-budget"] = self.memory_budget_bytes
        if self.share == "stacked":
            options["--stack"] = self.share_runs
        graphs = ["--cuda-graphs"] if self.cuda_graphs else []
        return [str(part) for option in options.items() for part in option] + graphs
