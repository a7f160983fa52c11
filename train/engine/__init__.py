"""The engine: optimizers, schedules, checkpoints, metrics, and the one training loop."""

from train.engine.loop import Host, train

__all__ = ["Host", "train"]
