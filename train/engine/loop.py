"""The training loop: RunSpec → RunRecord. A sweep's runs and the flagship go through here alike."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tqdm import tqdm

from scaling.errors import InputError
from scaling.mixture import check_epochs
from scaling.records import RunRecord, Status
from scaling.spec import RunSpec
from scaling.sweepdir import Lease, LostLease, RunDir
from train.data.loader import Corpus
from train.data.shards import check_vocabulary
from train.engine import checkpoint
from train.engine.evaluation import bits_per_byte
from train.engine.host import Host
from train.engine.memory import explained, settle
from train.engine.metrics import MetricsLog, start_wandb
from train.engine.profiler import profiled
from train.engine.record import make_record
from train.engine.signals import Interrupted, stop_requested
from train.engine.trainer import Diverged, Trainer
from train.engine.verdict import Verdict

if TYPE_CHECKING:
    from train.engine.parallel.world import World

__all__ = ["Diverged", "Host", "Trainer", "train"]

T = TypeVar("T")


def train(
    spec: RunSpec, run: RunDir, host: Host | None = None, lease: Lease | None = None, world: World | None = None
) -> RunRecord:
    """Train one run to its end, resuming from its last checkpoint, and write its record.

    Args:
        spec: what to train; its corpus must be prepared.
        run: the run's folder.
        host: where and how.
        lease: the caller's lease on the folder; acquired here when None.
        world: the ranks that train it together: each calls this, rank 0 with the lease; None: this process alone.
    Returns:
        The record: written here, or by whoever finished the run before.
    Raises:
        InputError: the corpus is not prepared, or too small for the run; somebody else is training the run.
        DoesNotFit: not enough memory, by the accounting before training or by the allocator in it.
        Interrupted: a signal asked to stop; a checkpoint was written.
        LostLease: a newer attempt owns the run.
    """
    host = host or Host()
    leads = world is None or world.leads
    if leads:
        run.create(spec)
        lease = lease or run.acquire()
    if not _shared(world, lease is not None):
        record = _shared(world, run.record() if leads else None)
        if record is None:
            raise InputError(f"run {spec.run_id} is being trained by another process (folder {run.path})")
        return record
    try:
        host = settle(spec, host, world)
        with explained(spec, host, world):
            return _train(spec, run, host, lease, world)
    finally:
        if lease is not None:
            lease.release()


def _shared(world: World | None, value: T) -> T:
    """Rank 0's value."""
    return value if world is None else world.share(value)


def _train(spec: RunSpec, run: RunDir, host: Host, lease: Lease | None, world: World | None) -> RunRecord:
    assert spec.data.digest is not None, "the launcher resolves the corpus"
    began = time.monotonic()
    verdict = Verdict(run.verdict_json)
    torch.set_num_threads(host.threads)
    corpus = Corpus.open(spec.data.digest)
    check_epochs(spec, corpus.manifest)
    check_vocabulary(spec.shape.vocab_size, corpus.manifest)
    trainer = Trainer(spec, corpus, host, world)
    resumed = trainer.restore(checkpoint.newest(run.checkpoints), spec.run_id)
    wall_before = trainer.progress.wall_s
    log = None
    if lease is not None:
        wandb_run = start_wandb(host.wandb, spec.run_id, run.path.parent.parent.name, spec.to_dict(), lease.folder)
        log = MetricsLog(lease.folder / "metrics.jsonl", wandb_run)
    status: Status = "ok"
    reason = None
    loss = None
    with contextlib.closing(log) if log else contextlib.nullcontext(), contextlib.closing(trainer.writer):
        try:
            if not resumed:
                trainer.branch_off(run)
            loss = _steps(trainer, run, lease, log, verdict, began)
        except Diverged as error:
            status, reason = "diverged", str(error)
    trainer.progress.wall_s = wall_before + time.monotonic() - began
    _check_lease(lease, world)
    record = None
    if lease is not None:
        run.merge_metrics()
        record = make_record(trainer, lease, status, loss, reason)
        run.record_json.parent.mkdir(parents=True, exist_ok=True)
        record.write_once(run.record_json)
        checkpoint.keep_last(run.checkpoints)
    record = _shared(world, record)
    assert record is not None
    return record


def _check_lease(lease: Lease | None, world: World | None) -> None:
    """Raise LostLease on every rank when a newer attempt owns the run."""
    lost = None
    try:
        if lease is not None:
            lease.check()
    except LostLease as error:
        lost = error
    lost = _shared(world, lost)
    if lost is not None:
        raise lost


def _steps(
    trainer: Trainer, run: RunDir, lease: Lease | None, log: MetricsLog | None, verdict: Verdict, began: float
) -> float:
    """Step to the end of the run. Returns the final held-out loss."""
    spec, host, world = trainer.spec, trainer.host, trainer.world
    wall_before = trainer.progress.wall_s
    val_loss = math.nan
    saved = time.monotonic()
    noted: dict[str, int] = {}

    def save(keep: bool = False) -> None:
        nonlocal saved
        _check_lease(lease, world)
        if log is not None:
            log.sync()
        trainer.progress.wall_s = wall_before + time.monotonic() - began
        trainer.save(run.checkpoints, keep)
        saved = time.monotonic()

    batches = _batches(trainer)
    timed: Iterator[tuple[torch.Tensor, torch.Tensor, float]] = batches
    if host.profile_steps and lease is not None:
        timed = profiled(timed, host.profile_steps, run.path)
    with contextlib.closing(batches), _progress_bar(trainer) as bar:
        for inputs_BT, targets_BT, waited_s in timed:
            row = _timed_step(trainer, inputs_BT, targets_BT, waited_s) | noted
            noted = {}
            rollback = trainer.spiked(row["train_loss"])
            if rollback is not None and trainer.roll_back(rollback, run.checkpoints):
                if log is not None:
                    log.write(row)
                noted = {"rolled_back_from": rollback.step, "skipped_batches": rollback.skipped_batches}
                save()
                continue
            trainer.watch_loss(row["train_loss"])
            if trainer.is_evaluation_step():
                val_loss = trainer.evaluate()
                row |= _evaluation_row(trainer, val_loss)
            said = verdict.look() if lease is not None else None
            if said is not None:
                row |= said.row
            if log is not None:
                log.write(row)
            step = trainer.progress.step
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{row['train_loss']:.3f}", refresh=False)
            asked = None if said is None else said.asked
            stop, keep = stop_requested() or asked == "stop", asked == "checkpoint"
            due = keep or time.monotonic() - saved > host.checkpoint_every_s
            if world is not None:
                world.watch(host.step_timeout_s)
                stop, due, keep = world.agree(stop, due and world.leads, keep)
            if stop:
                save()
                trainer.writer.wait()
                raise Interrupted(
                    f"run {spec.run_id}: stopped at step {step} of {spec.steps}, checkpoint written"
                    + (f"; the watch asked for it: {said.reason}" if said is not None and asked == "stop" else "")
                )
            due = due or trainer.is_rollback_step()
            if (due and step < spec.steps) or step in spec.keep_steps:
                save(keep)
    if math.isnan(val_loss):  # resumed from the last step's checkpoint: there was no step left to do
        val_loss = trainer.evaluate()
    if not math.isfinite(val_loss):
        raise Diverged(f"held-out loss is {val_loss} at the end")
    save()  # the trained model
    trainer.writer.wait()
    return val_loss


def _progress_bar(trainer: Trainer) -> tqdm[Any]:
    return tqdm(
        total=trainer.spec.steps,
        initial=trainer.progress.step,
        unit="step",
        disable=not (trainer.host.progress and trainer.leads),
        file=sys.stderr,
        leave=False,
    )


def _timed_step(
    trainer: Trainer, inputs_BT: torch.Tensor, targets_BT: torch.Tensor, waited_s: float
) -> dict[str, Any]:
    """One step, the run's clocks with it. Returns its row of metrics.jsonl.

    Args:
        waited_s: for the batch.
    """
    spec, world = trainer.spec, trainer.world
    start = time.monotonic()
    if world is not None:
        world.begin_wait()
    found = trainer.step(inputs_BT, targets_BT)
    waited_for_ranks_s = None if world is None else world.take_wait()
    progress = trainer.progress
    step_s = time.monotonic() - start + waited_s
    tokens = spec.tokens_in(progress.step)
    progress.train_s += step_s
    progress.data_wait_s += waited_s
    row = {
        "step": progress.step,
        "tokens": tokens,
        **found,
        "tokens_per_s": round((tokens - spec.tokens_in(progress.step - 1)) / step_s, 1),
        "data_wait_s": round(waited_s, 6),
    }
    if waited_for_ranks_s is not None:
        progress.comm_wait_s = (progress.comm_wait_s or 0.0) + waited_for_ranks_s
        row["comm_wait_s"] = round(waited_for_ranks_s, 6)
    return row


def _evaluation_row(trainer: Trainer, val_loss: float) -> dict[str, float]:
    """What an evaluation adds to a step's row."""
    return {
        "val_loss": val_loss,
        "val_bits_per_byte": bits_per_byte(val_loss, trainer.bytes_per_token),
        **{f"val_loss_{name}": loss for name, loss in trainer.source_losses.items()},
    }


def _batches(trainer: Trainer) -> Generator[tuple[torch.Tensor, torch.Tensor, float]]:
    """The batch of each step to come, with the seconds that it was waited for; after a rollback from another place on."""
    steps = trainer.spec.steps
    while trainer.progress.step < steps:
        ahead = trainer.skipped_batches
        with contextlib.closing(trainer.loader.iterate(trainer.progress.step + ahead, steps + ahead)) as batches:
            while trainer.skipped_batches == ahead:
                start = time.monotonic()
                batch = next(batches, None)
                if batch is None:
                    return
                yield *batch, time.monotonic() - start
