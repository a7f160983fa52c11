"""Train runs: one folder, or a sweep's. What the launchers start; rarely typed by hand."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

from scaling.config import to_dict
from scaling.errors import InputError, run_command
from scaling.files import write_json
from scaling.layout import layout_values
from scaling.provenance import git_commit, slurm_ids, versions
from scaling.ranks import run_ranks
from scaling.steptime import Layout
from scaling.sweepdir import LAUNCH_VARIABLE, Lease, LostLease, RunDir, SweepDir

if TYPE_CHECKING:
    from scaling.spec import RunSpec
    from train.engine import Host
    from train.engine.parallel.world import World

Taken = tuple[RunDir, Lease]
"""A run and the right to train it."""

EPILOG = """
examples:
  python -m train.run sweeps/demo/runs/0123456789abcdef     train or resume one run (its spec.json says what)
  python -m train.run --sweep sweeps/demo --runs ID,ID,…    a worker: train whichever of these nobody else does
  python -m train.run RUN_DIR --processes 4 --layout tensor=2   one run on four processes of this machine
  torchrun --nproc-per-node 8 -m train.run RUN_DIR --device cuda    on eight GPUs; srun with a task a GPU does the same
Ranks that the layout does not name are data ranks, which share weights and optimizer states (FSDP). A run may be stopped
and go on with another number of ranks, and another layout.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.run", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN_DIR", help="a run's folder")
    parser.add_argument("--sweep", type=Path, metavar="DIR", help="a sweep's folder")
    parser.add_argument("--runs", metavar="ID,ID", help="run ids of the sweep, in the order to take them")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of this process (default 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--checkpoint-every", type=float, default=20.0, metavar="S", help="seconds between checkpoints"
    )
    parser.add_argument(
        "--micro-batch-tokens",
        type=int,
        default=16384,
        metavar="T",
        help="most tokens in one forward and backward pass",
    )
    parser.add_argument(
        "--compile",
        default="none",
        choices=["none", "block", "whole", "auto"],
        help="torch.compile of each layer or of the model; auto: block where a run takes over two minutes (default none)",
    )
    parser.add_argument(
        "--attention",
        default="auto",
        choices=["auto", "sdpa", "flash3", "flash4"],
        help="its kernels: torch's own, FlashAttention-3 or 4; auto: the best that the GPU and its packages have (default)",
    )
    parser.add_argument(
        "--recompute",
        default="none",
        choices=["none", "selective", "full", "budget"],
        help="what the backward pass computes again, to save memory; budget: the least that fits (default none)",
    )
    parser.add_argument(
        "--memory-budget", type=float, metavar="BYTES", help="of --recompute budget (default: what the device has)"
    )
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="the forward and backward pass as one CUDA graph, for small models"
    )
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="profile N steps: a trace and a table")
    parser.add_argument("--processes", type=int, metavar="N", help="train one run on N processes of this machine")
    parser.add_argument(
        "--layout", default="", metavar="NAME=VALUE,…", help=f"of several ranks: {', '.join(get_type_hints(Layout))}"
    )
    parser.add_argument(
        "--step-timeout",
        type=float,
        default=180.0,
        metavar="S",
        help="of several ranks: a step that takes longer is hung; its ranks print their stacks and end",
    )
    parser.add_argument(
        "--stack", type=int, default=1, metavar="R", help="a worker trains up to R runs of one shape and batch as one"
    )
    parser.add_argument("--max-attempts", type=int, default=3, help="tries of a run that raises an error (default 3)")
    parser.add_argument("--wandb", default="disabled", choices=["disabled", "offline", "online"])
    return parser


def main(argv: list[str]) -> int:
    """Parse the command line and train."""
    args = _parser().parse_args(argv)
    if (args.run is None) == (args.sweep is None):
        raise InputError("give a run's folder, or --sweep DIR --runs ID,ID")
    if args.layout:
        layout_values(args.layout)
    if args.stack < 1:
        raise InputError(f"--stack {args.stack}: must be at least 1")
    alone = args.compile != "none" or args.recompute != "none" or args.cuda_graphs or args.wandb != "disabled"
    if args.stack > 1 and alone:
        raise InputError("--stack goes without --compile, --recompute, --cuda-graphs and --wandb: leave one out")
    if args.processes is not None:
        if args.run is None or args.processes < 1:
            raise InputError(f"--processes {args.processes}: a number of processes, at least 1, for one run's folder")
        command = [word for word in argv if not word.startswith("--processes=")]
        if "--processes" in command:
            place = command.index("--processes")
            del command[place : place + 2]
        return run_ranks([sys.executable, "-m", "train.run", *command], args.processes)

    from train.engine import Host  # torch: 2 s, after the arguments are known to be good
    from train.engine.parallel.world import as_rank, device_of, find_world
    from train.engine.signals import install_handlers

    install_handlers()
    world = find_world()
    host = Host(
        device=device_of(args.device, world, os.environ),
        threads=args.threads,
        checkpoint_every_s=args.checkpoint_every,
        micro_batch_tokens=args.micro_batch_tokens,
        wandb=args.wandb,
        progress=args.sweep is None and sys.stderr.isatty(),
        layout=args.layout,
        compile=args.compile,
        attention=args.attention,
        recompute=args.recompute,
        memory_budget_bytes=args.memory_budget,
        cuda_graphs=args.cuda_graphs,
        profile_steps=args.profile,
        step_timeout_s=args.step_timeout,
    )
    if args.run is not None:
        run = RunDir(args.run)
        return as_rank(world, host.device, lambda: train_one(run, host, world))
    sweep, stack = SweepDir(args.sweep), args.stack if world is None else 1
    ids = args.runs.split(",") if args.runs else [spec.run_id for spec in sweep.plan().runs]
    if world is not None and not world.leads:
        return as_rank(world, host.device, lambda: follow(sweep, host, world))
    return as_rank(world, host.device, lambda: 0 if work(sweep, ids, host, args.max_attempts, world, stack) else 1)


def train_one(run: RunDir, host: Host, world: World | None) -> int:
    """Train one run. Returns the exit status."""
    from train.engine import train

    record = train(run.spec(), run, host, world=world)
    if world is None or world.leads:
        print(f"{record.run_id}: {record.status}, loss {record.loss}")
    return 0


def follow(sweep: SweepDir, host: Host, world: World) -> int:
    """Ranks after the first train with it what `work` takes there. Returns the exit status."""
    from train.engine import train

    while (told := world.share(("", 0)))[0]:
        run_id, micro_batch = told
        run = sweep.run(run_id)
        with contextlib.suppress(LostLease):
            train(run.spec(), run, dataclasses.replace(host, micro_batch_tokens=micro_batch), world=world)
    return told[1]


def work(
    sweep: SweepDir, run_ids: list[str], host: Host, max_attempts: int, world: World | None = None, stack: int = 1
) -> bool:
    """Train the runs that nobody else has taken, one after another, until none is left to take.

    A branch is left alone while one of these runs, its trunk, has not come to the branch point.
    A run that raises leaves `failure.json` in its attempt's folder and is tried again, max_attempts times in a launch.
    One that runs out of memory is tried again with half the micro-batch, down to one sequence: the same batches in
    smaller parts, so the same run.

    Args:
        stack: most runs of one shape and batch that are trained as one.
    Returns:
        Whether none of the runs tried here failed for good.
    """
    parent, launch = os.getppid(), os.environ.get(LAUNCH_VARIABLE)
    failures: dict[str, int] = {}

    def take(run_id: str) -> tuple[RunDir, Lease] | None:
        run = sweep.run(run_id)
        tried = max(failures.get(run_id, 0), run.failures(launch) if launch else 0)
        lease = None if tried >= max_attempts or run.waits_for() in run_ids else run.acquire()
        return None if lease is None else (run, lease)

    progress = True
    while progress:
        progress = False
        for number, run_id in enumerate(run_ids):
            if os.getppid() != parent:  # the launcher is gone: finish nothing more on its behalf
                return True
            taken = take(run_id)
            if taken is None:
                continue
            progress = True
            mates = [taken] if stack == 1 else _mates(taken, map(sweep.run, run_ids[number + 1 :]), take, stack)
            for (run, _), is_well in zip(mates, _attempts(mates, host, world), strict=True):
                if not is_well:
                    failures[run.path.name] = failures.get(run.path.name, 0) + 1
    ok = all(count < max_attempts for count in failures.values())
    if world is not None:
        world.share(("", 0 if ok else 1))
    return ok


def _mates(first: Taken, others: Iterable[RunDir], take: Callable[[str], Taken | None], stack: int) -> list[Taken]:
    """A run that was taken, and those of the others, taken now, that can be stacked with it."""
    from train.engine.stacked import stack_key

    mates, key = [first], stack_key(first[0].spec())
    for run in others:
        if key is None or len(mates) == stack:
            break
        if not run.record_json.exists() and stack_key(run.spec()) == key:
            taken = take(run.path.name)
            mates += [] if taken is None else [taken]
    return mates


def _attempts(mates: list[Taken], host: Host, world: World | None) -> list[bool]:
    """One attempt at each of the runs, as one where they are several; `_attempt` of each."""
    if len(mates) == 1:
        run, lease = mates[0]
        return [_attempt(run, host, lease, world)]
    from train.engine.stacked import Member, together

    def work_of(run: RunDir, lease: Lease) -> Callable[[Member], bool]:
        return lambda member: _attempt(run, dataclasses.replace(host, member=member), lease, world)

    return together([work_of(*mate) for mate in mates])


def _attempt(run: RunDir, host: Host, lease: Lease, world: World | None = None) -> bool:
    """One attempt at a run. Returns False when it raised, other than for memory that a smaller micro-batch may save."""
    from train.engine import train
    from train.engine.memory import is_out_of_memory

    spec = run.spec()
    micro_batch = min(host.micro_batch_tokens, spec.batch_tokens, run.micro_batch_limit() or spec.batch_tokens)
    micro_batch = max(micro_batch, spec.shape.seq_len)
    host = dataclasses.replace(host, micro_batch_tokens=micro_batch)
    write_json(lease.folder / "provenance.json", _provenance(spec, host, world))
    if world is not None:
        world.share((run.path.name, micro_batch))
    try:
        train(spec, run, host, lease, world)
    except LostLease as error:
        print(error, file=sys.stderr)
    except Exception as error:
        shown = error if world is None else world.explain(error)
        reason = " ".join(f"{type(shown).__name__}: {shown}".split())
        print(f"run {run.path.name}: {reason}", file=sys.stderr)
        traceback.print_exc()
        can_shrink = is_out_of_memory(shown) and micro_batch > spec.shape.seq_len
        run.write_failure(lease.attempt, reason, out_of_memory_at=micro_batch if can_shrink else None)
        lease.release()
        if world is not None:  # the other ranks are somewhere in the step
            raise shown from error
        del shown  # its traceback, in whose frames the step's tensors are, ends here and not at a garbage collection
        return can_shrink
    return True


def _provenance(spec: RunSpec, host: Host, world: World | None) -> dict[str, object]:
    """What an attempt ran on: code, libraries, device, memory, host, SLURM job."""
    from train.engine.memory import room, settings

    memory = {"settings": to_dict(settings(spec, host, world)), "room": to_dict(room(host.device))}
    return {
        "commit": git_commit(),
        "versions": versions("torch", "numpy", "tokenizers", "isoflop"),
        "device": host.device,
        "threads": host.threads,
        "micro_batch_tokens": host.micro_batch_tokens,
        "memory": memory,
        "host": socket.gethostname(),
        "slurm": slurm_ids(),
    }


if __name__ == "__main__":
    run_command(main)
