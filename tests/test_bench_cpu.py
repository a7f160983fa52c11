"""bench/cpu.py at a tiny width: what it chose, its table, and ratios of two runs that took place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_has_both_loops_and_their_ratio() -> None:
    command = [sys.executable, "bench/cpu.py", "--width", "16", "--steps", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("precision=fp32: ")
    assert re.search(r"width 16, 3 steps of 4096 tokens; engine: fp32, compile=auto", done.stdout)
    rows = dict(line.strip("| ").split(" | ", 1) for line in done.stdout.splitlines() if line.startswith("| "))
    seconds = {name: [float(cell) for cell in rows[name].split(" | ")[:2]] for name in ("plain", "engine")}
    ratios = [float(cell) for cell in re.findall(r"×([\d.]+)", rows["ratio"])]
    assert len(ratios) == 2
    for ratio, plain, engine in zip(ratios, *seconds.values(), strict=True):
        assert 0 < 0.8 * ratio < plain / engine < 1.25 * ratio  # of rounded seconds
