"""A worker that the kernel kills for want of memory, or that sees before that it would: its run goes on with half the micro-batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scaling.sweepdir import SweepDir

LIMIT_BYTES = 600 * 2**20
LAUNCH = """
import os, sys
from pathlib import Path
from scaling.errors import run_command
from scaling.grid import expand_grid
from scaling.launch import LocalLauncher, launch
from scaling.sweepdir import SweepDir

def main(argv):
    group, folder, *overrides = argv
    Path(group, "cgroup.procs").write_text(str(os.getpid()))
    launcher = LocalLauncher(workers=1, micro_batch_tokens=131072)
    return launch(SweepDir(Path(folder)), expand_grid(overrides), overrides, launcher)

run_command(main)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with LIMIT_BYTES of memory, of cgroup version 1 or 2."""
    version_1 = Path("/sys/fs/cgroup/memory")
    path = (version_1 if version_1.exists() else Path("/sys/fs/cgroup")) / f"isoflop-{os.getpid()}"
    try:
        path.mkdir()
        (path / ("memory.limit_in_bytes" if version_1.exists() else "memory.max")).write_text(str(LIMIT_BYTES))
    except OSError as error:
        pytest.skip(f"no control group with a memory limit can be made here: {error}")
    yield path
    path.rmdir()


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (
            106496,
            "killed for want of memory: out of memory: a step of run",
        ),  # what else is in the group is not predicted
        (131072, "DoesNotFit: out of memory: a step of run"),
    ],
)
def test_a_run_that_does_not_fit_goes_on_with_a_smaller_micro_batch(
    group: Path, cache: Path, tmp_path: Path, settings: list[str], tokens: int, reason: str
) -> None:
    sweep = SweepDir(tmp_path / "sweep")
    large = [
        *settings[:3],
        "model.vocab_size=600",
        f"tokens={tokens}",
        f"batch_tokens={tokens}",
        "eval.tokens=4096",
        "seed=0",
    ]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(group), str(sweep.path), *large, "data.max_epochs=9"],
        env={**os.environ, "ISOFLOP_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (record,) = sweep.records()
    attempts = sweep.run(record.run_id).attempts
    sizes = [
        json.loads(path.read_text())["micro_batch_tokens"] for path in sorted(attempts.glob("*/provenance.json"))
    ]
    assert len(sizes) > 1
    assert sizes == [tokens >> n for n in range(len(sizes))]
    said = json.loads((attempts / "0001" / "failure.json").read_text())["reason"]
    assert said.startswith(reason)
    assert f"the memory limit of control group /{group.name} is 629 MB" in said
