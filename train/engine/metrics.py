"""metrics.jsonl and its mirrors: one row a step, flushed before each checkpoint."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

FLUSH_S = 1.0


class MetricsLog:
    """Appends rows to a JSON-lines file, in batches of about a second; mirrors them to wandb when asked for."""

    def __init__(self, path: Path, wandb_run: Any = None) -> None:
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._wandb = wandb_run
        self._flushed = time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        """Add one row; `row["step"]` is its key."""
        self._file.write(json.dumps(row) + "\n")
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in row.items() if v is not None}, step=row["step"])
        if time.monotonic() - self._flushed > FLUSH_S:
            self._file.flush()
            self._flushed = time.monotonic()

    def sync(self) -> None:
        """Rows so far are on the disk after this."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close; ends the wandb run."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def start_wandb(
    mode: Literal["disabled", "offline", "online"], run_id: str, group: str, config: dict[str, Any], folder: Path
) -> Any:
    """A wandb run whose id is the run's, grouped by sweep, so that a requeued run stays one run; None when disabled."""
    if mode == "disabled":
        return None
    import wandb  # .5 s: only when asked for

    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    return wandb.init(
        project="isoflop", id=run_id, name=run_id, group=group, mode=mode, resume="allow",
        config=config, dir=str(folder.resolve()), settings=settings,  # its service may have started in another folder
    )  # fmt: skip
