"""RunSpec: everything that decides a run's result, frozen; run_id is the hash of it.

Where a run executes (device, layout, host, micro-batch) is not in it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from scaling.accounting import ParamCount, count_params, flops_per_token, training_flops
from scaling.config import canonical_json, from_dict, identity_dict, to_dict
from scaling.errors import InputError
from scaling.mixture import Mixture, parse_sources
from scaling.shape import ModelShape
from scaling.transfer import Multipliers, Transfer

CODE_CONTRACT = 1
"""Raised when a change of the code changes what a given RunSpec trains to."""

HOST = {"identity": False}


@dataclass(frozen=True)
class DataSpec:
    """The corpus. Its identity is the digest of the token shards that training reads, not where they came from."""

    name: Literal["stdlib", "site", "english", "headers", "text", "jsonl", "parquet", "mixture"]
    path: str | None = field(default=None, metadata=HOST)
    """Glob of the files of data=text, jsonl and parquet; of data=mixture "NAME=FILES; NAME=FILES"."""
    digest: str | None = None
    """First 16 hex of sha256 over tokenizer, train and validation tokens; None until the corpus is prepared."""
    max_epochs: float = field(default=1.0, metadata=HOST)
    """Refuse a run that would read the training tokens more often than this."""
    unique_tokens: int | None = field(default=None, metadata={"absent": None})
    """Train on the first so many tokens that a fresh run reads alone, again and again; None: on all of the corpus."""
    mixture: Mixture | None = field(default=None, metadata={"absent": None})
    """data=mixture: how much of each source is read."""
    document_mask: bool = field(default=False, metadata={"absent": False})
    """Whether attention stays within a document; else a window's documents see those before them."""

    def __post_init__(self) -> None:
        if self.name in ("text", "jsonl", "parquet") and not self.path:
            raise InputError(f"data={self.name} needs data.path=GLOB, the files to read")
        if self.name == "mixture":
            self._check_mixture()
        elif self.mixture is not None:
            raise InputError(f"data.mixture is set with data={self.name}: mixtures are data=mixture")
        if self.max_epochs <= 0:
            raise InputError(f"data.max_epochs = {self.max_epochs}: must be positive")
        if self.unique_tokens is not None and self.unique_tokens < 1:
            raise InputError(
                f"data.unique_tokens = {self.unique_tokens}: must be at least 1, or null for the whole corpus"
            )

    def _check_mixture(self) -> None:
        if not self.path or self.mixture is None:
            raise InputError(
                "data=mixture needs data.path='NAME=FILES; NAME=FILES' and data.mixture={weights: {NAME: SHARE, …}}"
            )
        named = list(parse_sources(self.path))
        if named != self.mixture.sources:
            raise InputError(
                f"data.mixture.weights name {', '.join(self.mixture.sources)}; data.path names {', '.join(named)}: weigh "
                "every source, with 0 where one is not read"
            )
        if self.unique_tokens is not None:
            raise InputError("data.unique_tokens with data=mixture: limit the sources' files instead")

    def unique(self, train_tokens: int) -> int:
        """Different tokens that training reads of a corpus that has `train_tokens`.

        Raises:
            InputError: the corpus has fewer than unique_tokens.
        """
        if (self.unique_tokens or 0) > train_tokens:
            raise InputError(
                f"data.unique_tokens = {self.unique_tokens:,}: data={self.name} has {train_tokens:,} training tokens: give "
                "fewer, or null for all of them"
            )
        return self.unique_tokens or train_tokens


@dataclass(frozen=True)
class OptimSpec:
    """AdamW for every parameter, or Muon for the layers' matrices and AdamW for the rest."""

    name: Literal["adamw", "muon"]
    peak_lr: float
    """Learning rate after warm-up. Muon's update is scaled to AdamW's RMS (match_rms_adamw), so one number serves both."""
    adamw_lr_ratio: float = 1.0
    """With Muon: learning rate of the parameters that AdamW keeps (embedding, head, norms), over peak_lr."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and embeddings have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    """Muon's momentum (Nesterov)."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down."""
    z_loss: float = 0.0
    """Weight of mean(logsumexp(logits)²) (PaLM's z-loss), not part of the reported loss."""

    def __post_init__(self) -> None:
        for name in ("peak_lr", "adamw_lr_ratio", "eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise InputError(f"optim.{name} = {getattr(self, name)}: must be positive")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optim.{name} = {getattr(self, name)}: must be in [0, 1)")
        for name in ("weight_decay", "z_loss"):
            if not getattr(self, name) >= 0:
                raise InputError(f"optim.{name} = {getattr(self, name)}: must not be negative")


@dataclass(frozen=True)
class ScheduleSpec:
    """Learning rate over the run: linear warm-up to peak_lr, then the kind's own shape down to final_lr_ratio·peak_lr."""

    kind: Literal["wsd", "cosine", "linear"]
    warmup_tokens: int
    decay_fraction: float = 0.2
    """wsd: the last part of the run, in which the learning rate falls (Hägele et al. 2024, arXiv 2405.18392)."""
    decay_shape: Literal["1-sqrt", "linear"] = "1-sqrt"
    """wsd: factor 1 − √x or 1 − x at fraction x of the decay."""
    final_lr_ratio: float = 0.0
    """Learning rate at the last step over peak_lr."""

    def __post_init__(self) -> None:
        if self.warmup_tokens < 0:
            raise InputError(f"schedule.warmup_tokens = {self.warmup_tokens}: must not be negative")
        for name in ("decay_fraction", "final_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"schedule.{name} = {getattr(self, name)}: must be in [0, 1]")


@dataclass(frozen=True)
class EvalSpec:
    """Evaluation on the fixed held-out set: `tokens` of the validation shard, in windows spread evenly over it."""

    tokens: int
    """Tokens predicted in each evaluation (fewer when the validation shard is smaller)."""
    points: int = field(default=10, metadata=HOST)
    """Evaluations in a run, evenly spaced, the last at its end."""

    def __post_init__(self) -> None:
        for name in ("tokens", "points"):
            if getattr(self, name) < 1:
                raise InputError(f"eval.{name} = {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class RollbackSpec:
    """What happens at a loss spike: back to a checkpoint from before it, and on with other batches.

    A step whose loss exceeds mean + sigma × standard deviation of the last `window` steps' is a spike (the rule by which
    OLMo-core's SkipStepOptimizer leaves out single steps, 6σ over 128). Chowdhery et al. 2022 (PaLM, arXiv 2204.02311, §5.1)
    went back about 100 steps and passed over 200 to 500 batches.
    """

    sigma: float = 6.0
    window: int = 128
    """Steps, before the first of which nothing is a spike."""
    every_steps: int = 50
    """A checkpoint is written this often; a spike goes back to the last but one, so 50 to 99 steps."""
    skip_steps: int = 150
    """Batches passed over beyond the one that spiked; those from the checkpoint to it are passed over too."""
    limit: int = 3
    """Spikes of a run that are rolled back; further ones are let be."""

    def __post_init__(self) -> None:
        for name in ("sigma", "every_steps", "limit"):
            if not getattr(self, name) > 0:
                raise InputError(f"rollback.{name} = {getattr(self, name)}: must be positive")
        if self.skip_steps < 0:
            raise InputError(f"rollback.skip_steps = {self.skip_steps}: must not be negative")
        if self.window < 2 * self.every_steps:
            raise InputError(
                f"rollback.window = {self.window}: must be at least 2 × every_steps = {2 * self.every_steps}, so that there "
                "is a checkpoint to go back to"
            )


@dataclass(frozen=True)
class BatchStage:
    """Steps of one batch at the start of a run, before it has its full one (GPT-3, arXiv 2005.14165, section 2.3)."""

    tokens: int
    """Tokens read in the stage: a multiple of batch_tokens."""
    batch_tokens: int
    """Tokens of one of its steps: a multiple of seq_len."""

    def __post_init__(self) -> None:
        if self.batch_tokens < 1 or self.tokens < 1 or self.tokens % self.batch_tokens:
            raise InputError(
                f"batch_ramp: {self.tokens} tokens in steps of {self.batch_tokens}: both positive, the first a multiple of "
                "the second"
            )


@dataclass(frozen=True)
class RunSpec:
    """One training run. `run_id` hashes the fields that decide its result."""

    shape: ModelShape
    data: DataSpec
    tokens: int
    """Training tokens: a multiple of batch_tokens."""
    batch_tokens: int
    """Tokens of one optimizer step, over all devices: a multiple of seq_len."""
    optim: OptimSpec
    schedule: ScheduleSpec
    eval: EvalSpec
    seed: int = 0
    """Decides the initial weights and the order of the data."""
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"
    divergence_factor: float = 2.0
    """Stop as diverged when the smoothed training loss exceeds this times its running minimum."""
    parent_run_id: str | None = field(default=None, metadata=HOST)
    """A branch: the run whose checkpoint it starts from. Up to parent_step both are the same run, bit for bit, so the
    parent saves steps and decides nothing: a branch and the same run trained from its first step have one run_id."""
    parent_step: int | None = field(default=None, metadata=HOST)
    """A branch: the parent's step it starts from."""
    keep_steps: tuple[int, ...] = field(default=(), metadata={**HOST, "absent": ()})
    """A trunk: steps whose checkpoints are kept for good, because branches start there."""
    rollback: RollbackSpec | None = field(default=None, metadata={"absent": None})
    """What happens at a loss spike; None: the run goes on through it."""
    batch_ramp: tuple[BatchStage, ...] = field(default=(), metadata={"absent": ()})
    """Stages of smaller batches before batch_tokens; which text a step reads depends on the tokens before it alone."""
    transfer: Transfer | None = field(default=None, metadata={"absent": None})
    """The base shape that optim's hyperparameters are of; None: they are this shape's own."""
    contract: int = CODE_CONTRACT

    def __post_init__(self) -> None:
        if self.batch_tokens < 1 or self.batch_tokens % self.shape.seq_len:
            raise InputError(
                f"batch_tokens {self.batch_tokens} is not a multiple of seq_len {self.shape.seq_len}: "
                f"use {max(1, round(self.batch_tokens / self.shape.seq_len)) * self.shape.seq_len}"
            )
        self._check_ramp()
        if self.tokens < 1 or (self.tokens - self._ramp_tokens) % self.batch_tokens:
            raise InputError(
                f"tokens {self.tokens} is not a multiple of batch_tokens {self.batch_tokens}: "
                f"use {max(1, round(self.tokens / self.batch_tokens)) * self.batch_tokens + self._ramp_tokens % self.batch_tokens}"
            )
        if self.schedule.warmup_tokens >= self.tokens:
            raise InputError(
                f"schedule.warmup_tokens {self.schedule.warmup_tokens} must be below the run's {self.tokens} tokens"
            )
        if self.divergence_factor <= 1:
            raise InputError(f"divergence_factor = {self.divergence_factor}: must be above 1")
        if (self.parent_run_id is None) != (self.parent_step is None):
            raise InputError(
                f"parent_run_id = {self.parent_run_id} with parent_step = {self.parent_step}: a branch has both, "
                "another run neither"
            )
        for step in (*self.keep_steps, *([] if self.parent_step is None else [self.parent_step])):
            if not 0 < step < self.steps:
                raise InputError(f"branch point {step}: must be within the run, from 1 to {self.steps - 1}")
        if self.rollback is not None and (self.keep_steps or self.parent_run_id is not None):
            raise InputError("rollback with branches: a trunk's steps must stay those of its branches; leave one out")
        if self.contract != CODE_CONTRACT:
            raise InputError(
                f"this run was planned for code contract {self.contract}, this code trains contract {CODE_CONTRACT}: "
                "plan it again"
            )

    def _check_ramp(self) -> None:
        for stage in self.batch_ramp:
            if stage.batch_tokens % self.shape.seq_len:
                raise InputError(
                    f"batch_ramp: {stage.batch_tokens} tokens are no multiple of seq_len {self.shape.seq_len}"
                )
        if self._ramp_tokens >= self.tokens:
            raise InputError(f"batch_ramp: its {self._ramp_tokens} tokens must be below the run's {self.tokens}")
        if self.batch_ramp and (self.keep_steps or self.parent_run_id is not None or self.rollback is not None):
            raise InputError("batch_ramp with branches or rollback: their steps must be of one size; leave one out")

    @property
    def _ramp_tokens(self) -> int:
        return sum(stage.tokens for stage in self.batch_ramp)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.steps_in(self.tokens)

    def steps_in(self, tokens: int) -> int:
        """Whole optimizer steps within the run's first tokens."""
        steps = 0
        for stage in self.batch_ramp:
            if tokens < stage.tokens:
                return steps + tokens // stage.batch_tokens
            steps, tokens = steps + stage.tokens // stage.batch_tokens, tokens - stage.tokens
        return steps + tokens // self.batch_tokens

    def tokens_in(self, steps: int) -> int:
        """Tokens of the run's first steps."""
        tokens = 0
        for stage in self.batch_ramp:
            count = min(steps, stage.tokens // stage.batch_tokens)
            tokens, steps = tokens + count * stage.batch_tokens, steps - count
        return tokens + steps * self.batch_tokens

    @property
    def trained_tokens(self) -> int:
        """Tokens that this run itself reads: a branch those after its branch point, another run all."""
        return self.tokens - (self.parent_step or 0) * self.batch_tokens

    @property
    def multipliers(self) -> Multipliers:
        """What the transfer makes of the hyperparameters; all 1 without one."""
        return Multipliers() if self.transfer is None else self.transfer.multipliers(self.shape)

    @property
    def params(self) -> ParamCount:
        """Parameters by group."""
        return count_params(self.shape)

    @property
    def flops(self) -> float:
        """Exact training FLOPs (causal attention), forward and backward, without evaluation."""
        return training_flops(self.shape, self.tokens)

    @property
    def bought_flops(self) -> float:
        """Exact FLOPs of the steps that this run itself trains: the trunk's steps are counted in the trunk."""
        return training_flops(self.shape, self.trained_tokens)

    @property
    def eval_flops(self) -> float:
        """Forward FLOPs of one evaluation."""
        return flops_per_token(self.shape).forward * self.eval.tokens

    @cached_property
    def run_id(self) -> str:
        """First 16 hex of sha256 over the canonical JSON of what decides the result."""
        return hashlib.sha256(canonical_json(identity_dict(self)).encode()).hexdigest()[:16]

    @property
    def forecast_id(self) -> str:
        """The run_id without rollback: a forecast is about the same run whether or not its spikes are rolled back."""
        return dataclasses.replace(self, rollback=None).run_id

    def with_digest(self, digest: str) -> RunSpec:
        """The same run on the prepared corpus of this digest."""
        return dataclasses.replace(self, data=dataclasses.replace(self.data, digest=digest))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        out: dict[str, Any] = to_dict(self)
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunSpec:
        """The inverse of `to_dict`; strict."""
        return from_dict(cls, data)
