"""How far a run has come."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """The loop's own counters; a checkpoint carries them, so that a resumed run ends with the same record."""

    step: int = 0
    """Optimizer steps done, a branch's trunk's included."""
    start_step: int = 0
    """The trunk's step that a branch started from; 0: trained from its first step."""
    smooth_loss: float | None = None
    lowest_loss: float = math.inf
    tail_loss: float = 0.0
    """Sum of the training loss over the last tenth of the steps."""
    train_s: float = 0.0
    wall_s: float = 0.0
    data_wait_s: float = 0.0
    """Of train_s: waiting for batches."""
    comm_wait_s: float | None = None
    """Of train_s: waiting for other ranks; None: there were none."""
    skipped_in_a_row: int = 0
    """Steps without an update up to this one."""
