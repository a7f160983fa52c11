"""Learning rate over a run, as a factor of peak_lr."""

from __future__ import annotations

import math

from scaling.errors import InputError
from scaling.spec import RunSpec, ScheduleSpec


def lr_factor(schedule: ScheduleSpec, tokens: float, total_tokens: float) -> float:
    """Learning rate over peak_lr for the step that ends at `tokens` of `total_tokens`.

    Linear warm-up over warmup_tokens, then
        wsd     1, and over the last decay_fraction of the run 1 − √x or 1 − x (Hägele et al. 2024, arXiv 2405.18392)
        cosine  (1 + cos πx)/2
        linear  1 − x
    each scaled to end at final_lr_ratio, x from 0 to 1 over the part that decays.
    """
    if tokens <= schedule.warmup_tokens:
        return tokens / schedule.warmup_tokens
    start = float(schedule.warmup_tokens)
    if schedule.kind == "wsd":
        start = max(start, total_tokens * (1.0 - schedule.decay_fraction))
    if tokens <= start:
        return 1.0
    x = (tokens - start) / (total_tokens - start)
    if schedule.kind == "cosine":
        falling = (1.0 + math.cos(math.pi * x)) / 2.0
    elif schedule.kind == "wsd" and schedule.decay_shape == "1-sqrt":
        falling = 1.0 - math.sqrt(x)
    else:
        falling = 1.0 - x
    return schedule.final_lr_ratio + (1.0 - schedule.final_lr_ratio) * falling


def branch_step(spec: RunSpec) -> int:
    """The last step at or before which neither learning rate nor data depend on the run's length: a branch starts there.

    Of a WSD run the end of its stable phase: ⌊max(warmup_tokens, (1 − decay_fraction)·D) / batch_tokens⌋, and before the last
    step; of a mixture with an annealing phase, the start of that where it is earlier.

    Raises:
        InputError: another schedule, whose learning rate depends on the length from the warm-up on.
    """
    if spec.schedule.kind != "wsd":
        raise InputError(
            f"schedule={spec.schedule.kind}: cool-downs branch off a constant learning rate: use schedule=wsd, or "
            "train the runs separately (sweep.branches=false)"
        )
    stable = max(float(spec.schedule.warmup_tokens), spec.tokens * (1.0 - spec.schedule.decay_fraction))
    if spec.data.mixture is not None:
        windows = spec.tokens // spec.shape.seq_len
        stable = min(stable, spec.data.mixture.anneal_from(windows) * spec.shape.seq_len)
    return min(int(stable // spec.batch_tokens), spec.steps - 1)


def learning_rates(spec: RunSpec) -> list[float]:
    """The learning rate of each step of a run."""
    return [
        spec.optim.peak_lr * lr_factor(spec.schedule, spec.tokens_in(step), spec.tokens)
        for step in range(1, spec.steps + 1)
    ]
