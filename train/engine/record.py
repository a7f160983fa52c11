"""The record of a finished run."""

from __future__ import annotations

import torch

from scaling.accounting import FLOPS_CONVENTIONS, PARAMS_CONVENTIONS, recomputed_flops, training_flops
from scaling.hardware import match_device
from scaling.memory import describe_recompute
from scaling.mixture import source_epochs
from scaling.provenance import git_commit, versions
from scaling.records import RunRecord, Status
from scaling.sweepdir import Lease
from train.engine.evaluation import bits_per_byte
from train.engine.memory import settings
from train.engine.trainer import Trainer


def make_record(trainer: Trainer, lease: Lease, status: Status, loss: float | None, reason: str | None) -> RunRecord:
    """What the run was and came to."""
    spec, progress, corpus = trainer.spec, trainer.progress, trainer.corpus
    tokens = spec.tokens_in(progress.step)
    flops: dict[str, float] = {name: training_flops(spec.shape, tokens, name) for name in FLOPS_CONVENTIONS}
    params = spec.params
    description = torch.cuda.get_device_name() if trainer.device.type == "cuda" else trainer.device.type
    device = match_device(description)
    ranks = 1 if trainer.world is None else trainer.world.size
    at_work = ranks * (trainer.host.threads if trainer.device.type == "cpu" else 1)
    peak = None if device is None else device.peak(spec.precision) * at_work
    train_s = max(progress.train_s, 1e-9)
    trained = tokens - spec.tokens_in(progress.start_step)
    computed = {
        "mfu": training_flops(spec.shape, trained),
        "mfu_full_attention": training_flops(spec.shape, trained, "full_attention"),
        "hfu": training_flops(spec.shape, trained)
        + recomputed_flops(spec.shape, trainer.host.recompute, trainer.host.recompute_layers) * trained,
    }
    utilisation = {name: None if peak is None else flops / train_s / peak for name, flops in computed.items()}
    return RunRecord(
        run_id=spec.run_id,
        status=status,
        spec=spec,
        params=params.groups | {name: params.count(name) for name in PARAMS_CONVENTIONS},
        tokens=tokens,
        flops=flops,
        loss=loss,
        bits_per_byte=None if loss is None else bits_per_byte(loss, trainer.bytes_per_token),
        train_loss=progress.tail_loss / trainer.tail_steps if status == "ok" else None,
        epochs=tokens / spec.data.unique(corpus.manifest.train_tokens),
        wall_s=progress.wall_s,
        train_s=progress.train_s,
        tokens_per_s=trained / train_s,
        mfu=utilisation["mfu"],
        mfu_full_attention=utilisation["mfu_full_attention"],
        hfu=utilisation["hfu"],
        data_wait_s=progress.data_wait_s,
        comm_wait_s=progress.comm_wait_s,
        energy_j=trainer.energy.joules(),
        recompute=describe_recompute(settings(spec, trainer.host, trainer.world)),
        source_losses=trainer.source_losses if status == "ok" else {},
        source_epochs=source_epochs(spec, corpus.manifest, tokens) if spec.data.mixture else {},
        start_step=progress.start_step,
        rollbacks=[] if trainer.spikes is None else trainer.spikes.rollbacks,
        attempts=lease.attempt,
        device=description,
        threads=trainer.host.threads,
        versions=versions("torch", "numpy", "tokenizers", "isoflop"),
        commit=git_commit(),
        reason=reason,
    )
