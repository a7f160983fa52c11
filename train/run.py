"""Train runs: one folder, or a sweep's. What the launchers start; rarely typed by hand."""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import sys
import traceback
from pathlib import Path

from scaling.errors import InputError, run_command
from scaling.files import write_json
from scaling.provenance import git_commit, slurm_ids, versions
from scaling.sweepdir import LAUNCH_VARIABLE, Lease, LostLease, RunDir, SweepDir

EPILOG = """
examples:
  python -m train.run sweeps/demo/runs/0123456789abcdef     train or resume one run (its spec.json says what)
  python -m train.run --sweep sweeps/demo --runs ID,ID,…    a worker: train whichever of these nobody else does
"""


def main(argv: list[str]) -> int:
    """Parse the command line and train."""
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
    parser.add_argument("--max-attempts", type=int, default=3, help="tries of a run that raises an error (default 3)")
    parser.add_argument("--wandb", default="disabled", choices=["disabled", "offline", "online"])
    args = parser.parse_args(argv)
    if (args.run is None) == (args.sweep is None):
        raise InputError("give a run's folder, or --sweep DIR --runs ID,ID")

    from train.engine import Host  # torch: 2 s, after the arguments are known to be good
    from train.engine.signals import install_handlers

    install_handlers()
    host = Host(
        device=args.device,
        threads=args.threads,
        checkpoint_every_s=args.checkpoint_every,
        micro_batch_tokens=args.micro_batch_tokens,
        wandb=args.wandb,
        progress=args.sweep is None and sys.stderr.isatty(),
    )
    if args.run is not None:
        from train.engine import train

        run = RunDir(args.run)
        record = train(run.spec(), run, host)
        print(f"{record.run_id}: {record.status}, loss {record.loss}")
        return 0
    sweep = SweepDir(args.sweep)
    ids = args.runs.split(",") if args.runs else [spec.run_id for spec in sweep.plan().runs]
    return 0 if work(sweep, ids, host, args.max_attempts) else 1


def work(sweep: SweepDir, run_ids: list[str], host: object, max_attempts: int) -> bool:
    """Train the runs that nobody else has taken, one after another, until none is left to take.

    A branch is left alone while one of these runs, its trunk, has not come to the branch point.
    A run that raises leaves `failure.json` in its attempt's folder and is tried again, max_attempts times in a launch.
    One that runs out of memory is tried again with half the micro-batch, down to one sequence: the same batches in
    smaller parts, so the same run.

    Returns:
        Whether none of the runs tried here failed for good.
    """
    parent, launch = os.getppid(), os.environ.get(LAUNCH_VARIABLE)
    failures: dict[str, int] = {}
    progress = True
    while progress:
        progress = False
        for run_id in run_ids:
            if os.getppid() != parent:  # the launcher is gone: finish nothing more on its behalf
                return True
            run = sweep.run(run_id)
            tried = max(failures.get(run_id, 0), run.failures(launch) if launch else 0)
            if tried >= max_attempts:
                continue
            lease = None if run.waits_for() in run_ids else run.acquire()
            if lease is None:
                continue
            progress = True
            if not _attempt(run, host, lease):
                failures[run_id] = failures.get(run_id, 0) + 1
    return all(count < max_attempts for count in failures.values())


def _attempt(run: RunDir, host: object, lease: Lease) -> bool:
    """One attempt at a run. Returns False when it raised, other than for memory that a smaller micro-batch may save."""
    from train.engine import Host, train

    assert isinstance(host, Host)
    spec = run.spec()
    micro_batch = min(host.micro_batch_tokens, spec.batch_tokens, run.micro_batch_limit() or spec.batch_tokens)
    micro_batch = max(micro_batch, spec.shape.seq_len)
    write_json(lease.folder / "provenance.json", _provenance(host, micro_batch))
    try:
        train(spec, run, dataclasses.replace(host, micro_batch_tokens=micro_batch), lease)
    except LostLease as error:
        print(error, file=sys.stderr)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"run {run.path.name}: {reason}", file=sys.stderr)
        traceback.print_exc()
        can_shrink = _is_out_of_memory(error) and micro_batch > spec.shape.seq_len
        run.write_failure(lease.attempt, reason, out_of_memory_at=micro_batch if can_shrink else None)
        lease.release()
        return can_shrink
    return True


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the device or of the process (torch's CPU allocator raises a plain RuntimeError)."""
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _provenance(host: object, micro_batch_tokens: int) -> dict[str, object]:
    """What an attempt ran on: code, libraries, device, host, SLURM job."""
    from train.engine import Host

    assert isinstance(host, Host)
    return {
        "commit": git_commit(),
        "versions": versions("torch", "numpy", "tokenizers", "isoflop"),
        "device": host.device,
        "threads": host.threads,
        "micro_batch_tokens": micro_batch_tokens,
        "host": socket.gethostname(),
        "slurm": slurm_ids(),
    }


if __name__ == "__main__":
    run_command(main)
