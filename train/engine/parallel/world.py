"""The processes of one run: how they find each other, agree, and end together.

They are started by torchrun, by srun (one task a rank), or by `train.run --processes`; RANK and WORLD_SIZE, or SLURM's
variables, say which one this is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import fcntl
import gc
import hashlib
import os
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from scaling.errors import InputError
from scaling.provenance import code_digest, git_commit, versions
from scaling.ranks import find_place
from train.engine.parallel.waiting import count_waits, waits

T = TypeVar("T")

START_TIMEOUT_S = 900.0
"""For the ranks to find each other, and for the first step: compilation, a cold file system."""
REPORT_S = 5.0
"""How long rank 0 waits for the reason of a rank that broke off."""
MOST_NAMED = 4
"""Differences between ranks' versions that are told one by one."""
SIOCGIFADDR = 0x8915
ERROR_KEY, ENDED_KEY = "isoflop/error", "isoflop/ended"


class PeerFailed(RuntimeError):
    """Another rank ended; the message says which and why, as far as it said so."""


@dataclass(frozen=True)
class World:
    """This process among those of its run."""

    rank: int
    size: int
    local_rank: int = 0
    """Its number on its host: the GPU that it takes."""
    group: dist.ProcessGroup | None = None
    """The connections; None: those that training uses."""

    @property
    def leads(self) -> bool:
        """Whether this rank holds the lease and writes the run's files."""
        return self.rank == 0

    @cached_property
    def apart(self) -> World:
        """The same ranks on connections of their own, for a thread beside training. All ranks ask for it together."""
        group = dist.new_group(timeout=timedelta(seconds=START_TIMEOUT_S), backend="gloo")
        return dataclasses.replace(self, group=group)

    def agree(self, *flags: bool) -> list[bool]:
        """Which of the flags any rank has set."""
        values = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return [bool(value) for value in values]

    def share(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def collect(self, value: T) -> list[T]:
        """Every rank's value, on every rank, by rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def watch(self, timeout_s: float) -> None:
        """Unless called again within that time, print every thread's stack and end this process."""
        faulthandler.dump_traceback_later(timeout_s, exit=True)

    def begin_wait(self) -> None:
        """From here on `take_wait` counts."""
        waits.begin()

    def take_wait(self) -> float:
        """Seconds that this rank has waited for others since `begin_wait`: data under way and slower ranks alike.

        On a GPU, of waits that its stream has come to; the others are in the next call's.
        """
        return waits.take()

    def report(self, error: BaseException) -> None:
        """Leave word of why this rank ends, for rank 0 to say; the first word stands."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        try:
            _store().compare_set(ERROR_KEY, "", f"rank {self.rank} on {socket.gethostname()}: {text}")
            _store().add(ENDED_KEY, 1)
        except (RuntimeError, ValueError):
            if not isinstance(error, (InputError, KeyboardInterrupt)):  # of those rank 0 has said the same
                print(f"rank {self.rank} on {socket.gethostname()}: rank 0 is gone ({text})", file=sys.stderr)

    def wait_for_reports(self) -> None:
        """Rank 0, which keeps the store, ends after the others have left their word, or after REPORT_S."""
        deadline = time.monotonic() + REPORT_S
        with contextlib.suppress(RuntimeError, ValueError):
            while _store().add(ENDED_KEY, 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(0.02)

    def explain(self, error: Exception) -> Exception:
        """What to say of an error: of one that comes of another rank's end, that rank's own reason."""
        if not isinstance(error, RuntimeError) or not ("gloo" in str(error) or isinstance(error, dist.DistError)):
            return error
        deadline = time.monotonic() + REPORT_S
        with contextlib.suppress(RuntimeError, ValueError):
            while time.monotonic() < deadline:
                if _store().check([ERROR_KEY]):
                    return PeerFailed(_store().get(ERROR_KEY).decode())
                time.sleep(0.1)
        return PeerFailed(f"another rank ended without a word: {error}")


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def find_world() -> World | None:
    """This process's place by the variables of torchrun or SLURM; None: it is alone."""
    place = find_place(os.environ)
    return None if place is None else World(*place)


def device_of(device: str, world: World | None, environment: Mapping[str, str]) -> str:
    """The device of this rank: of a host's GPUs the one of its local rank, or the only one that it is shown (srun --gpus-per-task).

    Args:
        device: cpu, cuda, or cuda:N for this one.
    """
    if world is None or device != "cuda":
        return device
    shown = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return "cuda:0" if len(shown) == 1 else f"cuda:{world.local_rank}"


def join(world: World, device: str) -> None:
    """Meet the other ranks.

    Raises:
        InputError: no other rank within START_TIMEOUT_S, or one that runs other versions of the libraries.
    """
    world.watch(START_TIMEOUT_S)
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = slurm_master(os.environ)
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = _interface_to(os.environ["MASTER_ADDR"])
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    os.environ |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.size)}
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo",
            timeout=timedelta(seconds=START_TIMEOUT_S),
        )
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise InputError(f"rank {world.rank} of {world.size} cannot meet the others at {where}: {error}") from None
    count_waits(device)
    _check_versions(world)


def _check_versions(world: World) -> None:
    """Raise InputError on every rank where one runs other code than rank 0: what was loaded counts, not what is installed."""
    mine = {**versions("tokenizers"), "torch": torch.__version__, "numpy": np.__version__, "isoflop": code_digest()}
    found = world.collect((socket.gethostname(), mine))
    _, first = found[0]
    if all(theirs == first for _, theirs in found):
        return
    commits = world.collect(git_commit())
    differ = []
    for rank, (host, theirs) in enumerate(found):
        for name in sorted(first.keys() | theirs.keys()):
            if theirs.get(name) != first.get(name):
                here, there = (f"{v.get(name)}" for v in (theirs, first))
                if name == "isoflop":
                    here, there = f"{here} of commit {commits[rank]}", f"{there} of commit {commits[0]}"
                differ.append(f"rank {rank} on {host} has {name} {here} (rank 0: {there})")
    more = f" and {len(differ) - MOST_NAMED} more" if len(differ) > MOST_NAMED else ""
    raise InputError(
        f"{'; '.join(differ[:MOST_NAMED])}{more}: all ranks need the same versions; start them from one environment and one "
        "checkout that every node sees"
    )


def leave() -> None:
    """Close the connections; call it when the model is gone: gloo may abort at exit otherwise."""
    faulthandler.cancel_dump_traceback_later()
    if dist.is_initialized():
        dist.destroy_process_group()


def as_rank(world: World | None, device: str, work: Callable[[], int]) -> int:
    """Do the work among the ranks of a world, or alone. An error ends all ranks; rank 0 alone says why.

    Returns:
        Exit status.
    """
    if world is None:
        return work()
    try:
        join(world, device)
        status = work()
    except BaseException as error:
        status = 2 if isinstance(error, InputError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        if not world.leads:
            world.report(error)
        elif isinstance(error, Exception):
            shown = world.explain(error)
            print(f"error: {' '.join(str(shown).split())}", file=sys.stderr)
            if shown is error and status == 1:
                traceback.print_exc()
        else:
            print(error, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        if world.leads and status != 1:  # all ranks come to this error
            world.wait_for_reports()
        os._exit(status)  # gloo's threads may wait for the other ranks at an orderly exit
    gc.collect()  # the model before the connections: gloo may abort at exit otherwise
    leave()
    return status


def slurm_master(environment: Mapping[str, str]) -> tuple[str, str]:
    """Address of the job step's first node, and a port that follows from the step's id."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True).stdout.split()
    first = names[0] if names else nodes
    step = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    port = 20000 + int.from_bytes(hashlib.sha256(step.encode()).digest()[:2], "little") % 12000
    try:
        socket.getaddrinfo(first, port)
        return first, str(port)
    except OSError:  # a name that SLURM alone knows
        shown = subprocess.run(["scontrol", "-o", "show", "node", first], capture_output=True, text=True).stdout
        fields = dict(word.partition("=")[::2] for word in shown.split())
        return fields.get("NodeAddr", first), str(port)


def _interface_to(address: str) -> str | None:
    """The network interface by which this host reaches another: host names often lead gloo to the loopback alone."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            own = probe.getsockname()[0]
        except OSError:
            return None
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)[20:24])
            except OSError:  # an interface without an address
                continue
            if found == own:
                return name
    return None
