"""The time that a rank waits for others: in collectives and receives, of its own thread alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from scaling.ranks import run_ranks

SLOW_S = 0.5
RANK = f"""
import json, sys, threading, time
from pathlib import Path
import torch
import torch.distributed as dist
from train.engine.parallel.world import find_world, join, leave

def slowly(work):
    if world.rank == 1:
        time.sleep({SLOW_S})
    work()

world = find_world()
join(world, "cpu")
apart = world.apart
world.share(None)
world.take_wait()
waited = []
one = torch.zeros(1)
beside = threading.Thread(target=lambda: slowly(lambda: apart.agree(False)))
for work in (
    lambda: slowly(lambda: world.agree(False)),
    lambda: slowly(lambda: dist.send(one, 0) if world.rank else dist.recv(one, 1)),
    lambda: (beside.start(), beside.join()),
):
    work()
    waited.append(world.take_wait())
Path(sys.argv[1] + str(world.rank)).write_text(json.dumps(waited))
leave()
"""


def test_a_rank_waits_for_a_slower_one(tmp_path: Path) -> None:
    assert run_ranks([sys.executable, "-c", RANK, str(tmp_path / "rank")], 2) == 0
    first, slow = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    assert min(first[:2]) > 0.8 * SLOW_S  # the ranks leave a collective within microseconds of each other
    assert first[2] == slow[2] == 0
    assert 0 <= slow[0] < first[0]
