"""python -m scaling.sweep with the tests' worker: launch.py SWEEP_DIR SETTING=VALUE …"""

from __future__ import annotations

import sys
from pathlib import Path

from scaling.config import from_dict
from scaling.errors import run_command
from scaling.grid import expand_grid
from scaling.launch import LocalLauncher, SlurmLauncher, launch
from scaling.sweepdir import SweepDir

WORKER = Path(__file__).with_name("worker.py")


def main(argv: list[str]) -> int:
    folder, *overrides = argv
    grid = expand_grid(overrides)
    settings = grid.config["launcher"]
    kind: type[LocalLauncher | SlurmLauncher] = SlurmLauncher if settings["name"] == "slurm" else LocalLauncher
    launcher = from_dict(kind, settings, "launcher")
    return launch(SweepDir(Path(folder)), grid, overrides, launcher, worker_command=[sys.executable, str(WORKER)])


if __name__ == "__main__":
    run_command(main)
