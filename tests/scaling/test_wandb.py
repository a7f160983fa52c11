"""wandb, offline: the runs of one worker process are runs of their own, by run_id, in the sweep's group."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scaling.sweepdir import SweepDir


def test_packed_runs_keep_their_ids_and_share_the_group(
    cli: Callable[..., subprocess.CompletedProcess[str]],
    settings: list[str],
    tmp_path: Path,
    wandb_records: Callable[[Path], Iterator[bytes]],
    request: pytest.FixtureRequest,
) -> None:
    """Launched from a process that uses wandb itself, whose service, in another folder, the workers find and use."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    import wandb

    wandb.setup()
    request.addfinalizer(wandb.teardown)
    done = cli("scaling.sweep", *settings, "seed=0,1", "launcher.workers=1", "wandb.mode=offline", "sweep.dir=mine")
    assert done.returncode == 0, done.stderr
    sweep = SweepDir(tmp_path / "mine")
    found = {}
    for file in sweep.runs.glob("*/attempts/0001/wandb/offline-run-*/*.wandb"):
        rows = 0
        for record in map(pb.Record.FromString, wandb_records(file)):
            if record.WhichOneof("record_type") == "run":
                found[record.run.run_id] = record.run.run_group
            rows += record.WhichOneof("record_type") == "history"
        assert rows == 20
    assert found == {spec.run_id: "mine" for spec in sweep.plan().runs}
