"""The time that a rank waits for others: in collectives and receives, of its own thread alone; on a GPU, of its stream."""

from __future__ import annotations

import _thread
import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from scaling.ranks import run_ranks
from train.engine.parallel.waiting import Waits, events_on, is_beside

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
waited = []
one = torch.zeros(1)
beside = threading.Thread(target=lambda: slowly(lambda: apart.agree(False)))
for work in (
    lambda: slowly(lambda: world.agree(False)),
    lambda: slowly(lambda: dist.send(one, 0) if world.rank else dist.recv(one, 1)),
    lambda: (beside.start(), beside.join()),
):
    world.begin_wait()
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


class Stream:
    """Stands in for a GPU's stream, which this machine may not have: work is queued on it and takes its time there."""

    def __init__(self) -> None:
        self.free_at = 0.0

    def queue(self, seconds: float) -> None:
        self.free_at = max(self.free_at, time.monotonic()) + seconds

    def mark(self) -> Event:
        self.queue(0.0)
        return Event(self.free_at)


class Event:
    """As torch.cuda.Event: passed when the stream comes to it."""

    def __init__(self, at: float) -> None:
        self.at = at

    def query(self) -> bool:
        return time.monotonic() >= self.at

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


def test_a_streams_stall_is_counted_once_it_is_over() -> None:
    stream = Stream()
    waits = Waits(stream.mark)
    collective = waits.timed(lambda: stream.queue(0.2))
    waits.begin()
    stream.queue(0.4)  # computation before it is no wait
    collective()
    assert waits.take() == 0  # the host is ahead, and does not wait to know
    time.sleep(0.7)
    collective()  # between steps: an evaluation's
    waits.begin()
    assert waits.take() == pytest.approx(0.2, abs=0.02)
    time.sleep(0.25)
    waits.begin()
    assert waits.take() == 0


def test_what_the_host_waits_is_not_counted_on_the_stream_too() -> None:
    waits = Waits(Stream().mark)
    waits.begin()
    waits.timed(lambda: time.sleep(0.1), blocks_host=True)()
    assert waits.take() == pytest.approx(0.1, abs=0.05)


def test_whose_waits_a_stream_has() -> None:
    found: list[bool] = []
    ended = threading.Event()

    def look() -> None:
        found.append(is_beside())
        ended.set()

    beside = threading.Thread(target=look)
    beside.start()
    beside.join()
    ended.clear()
    _thread.start_new_thread(look, ())  # as a library's own, which is no threading.Thread
    assert ended.wait(10)
    assert [is_beside(), *found] == [False, True, False]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_events_on_a_gpu() -> None:
    device = torch.device("cuda:0")
    waits, beside = Waits(events_on(device)), torch.cuda.Stream(device)
    cycles = 10**8  # some 50 ms

    def spin() -> None:
        torch.cuda._sleep(cycles)

    waits.timed(spin)()  # loads the kernel
    torch.cuda.synchronize()
    waits.begin()
    waits.timed(spin)()
    with torch.cuda.stream(beside):  # training computes elsewhere meanwhile
        waits.timed(spin)()
    torch.cuda.synchronize()
    assert 0.01 < waits.take() < 0.5
