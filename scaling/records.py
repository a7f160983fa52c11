"""The files that pass between planner, engine and science: their schemas, versions and seals."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scaling.accounting import training_flops
from scaling.config import canonical_json, from_dict, to_dict
from scaling.errors import InputError
from scaling.files import read_versioned, write_json, write_json_once
from scaling.shape import ShapeFamily
from scaling.spec import RunSpec

Status = Literal["ok", "diverged", "failed"]


@dataclass(frozen=True)
class SourceManifest:
    """One source of a mixture: a stretch of the shards, after those of the sources before it."""

    name: str
    train_tokens: int
    validation_tokens: int
    train_documents: int
    validation_documents: int


@dataclass(frozen=True)
class DataManifest:
    """A prepared corpus: `CACHE/data/DIGEST/manifest.json` beside its shards."""

    VERSION = 1
    name: str
    digest: str
    """First 16 hex of sha256 over tokenizer, train and validation tokens."""
    vocab_size: int
    train_tokens: int
    validation_tokens: int
    train_bytes: int
    """UTF-8 bytes of the training documents."""
    validation_bytes: int
    """UTF-8 bytes of the validation documents: turns nats per token into bits per byte."""
    train_documents: int
    validation_documents: int
    duplicates_removed: int
    """Exact and near duplicates left out before the split."""
    replaced_bytes: int
    """Bytes that were not UTF-8 and became U+FFFD."""
    sources: tuple[SourceManifest, ...] = field(default=(), metadata={"absent": ()})
    """data=mixture: its sources, in the shards' order."""

    @classmethod
    def read(cls, path: Path) -> DataManifest:
        return from_dict(cls, read_versioned(path, "data manifest", cls.VERSION))

    def write(self, path: Path) -> None:
        write_json(path, {"schema_version": self.VERSION, **to_dict(self)})


@dataclass(frozen=True)
class Rollback:
    """A loss spike that was rolled back (RollbackSpec)."""

    step: int
    """The step that spiked."""
    to_step: int
    """The checkpoint's."""
    loss: float | None
    """Training loss of the step that spiked; None: not finite."""
    threshold: float
    """What it was above."""
    skipped_batches: int
    """Batches of the run's order that were passed over, those trained before the spike included."""

    def __str__(self) -> str:
        return f"training loss {self.loss} at step {self.step} is above {self.threshold:.4f}"


@dataclass(frozen=True)
class RunRecord:
    """What a finished run was and came to: `record.json`. Its presence means done."""

    VERSION = 1
    run_id: str
    status: Status
    spec: RunSpec
    params: dict[str, int]
    """Parameters by group, with total, non_embedding and body_head."""
    tokens: int
    """Training tokens seen."""
    flops: dict[str, float]
    """Training FLOPs under exact, full_attention and 6nd (body+head)."""
    loss: float | None
    """Held-out loss at the end, nats per token; None unless status is ok."""
    bits_per_byte: float | None
    """The same in bits per byte of held-out text."""
    train_loss: float | None
    """Mean training loss of the last tenth of the run's steps."""
    epochs: float
    """Training tokens over the corpus's training tokens."""
    wall_s: float
    """Seconds in the training loop over all attempts, evaluation and checkpoints included; its trunk's are not."""
    train_s: float
    """Seconds in training steps alone."""
    tokens_per_s: float
    """Training tokens over train_s, of the steps that this run trained itself."""
    mfu: float | None
    """Exact FLOPs per second over the device's peak; None where the peak is not known."""
    attempts: int
    device: str
    threads: int
    versions: dict[str, str]
    commit: str | None
    """Git commit of the code, with "+dirty" when the work tree was changed; None outside a clone."""
    reason: str | None = None
    """Why the run diverged or failed, one line."""
    mfu_full_attention: float | None = field(default=None, metadata={"absent": None})
    """The same with attention not halved (PaLM's convention)."""
    hfu: float | None = field(default=None, metadata={"absent": None})
    """MFU with the FLOPs of what the backward pass computed again."""
    data_wait_s: float | None = field(default=None, metadata={"absent": None})
    """Of train_s: waiting for batches."""
    comm_wait_s: float | None = field(default=None, metadata={"absent": None})
    """Of train_s: rank 0's waiting for other ranks, on a GPU its stream's; None: one process."""
    energy_j: float | None = field(default=None, metadata={"absent": None})
    """Joules that rank 0's device took in the last attempt, other work on it included; None: it does not tell."""
    recompute: str = field(default="none", metadata={"absent": "none"})
    """What the backward pass computed again, which changes no bit of the result."""
    source_losses: dict[str, float] = field(default_factory=dict, metadata={"absent": {}})
    """data=mixture: held-out loss of each source, nats per token."""
    source_epochs: dict[str, float] = field(default_factory=dict, metadata={"absent": {}})
    """data=mixture: how often each source's training tokens were read."""
    start_step: int = field(default=0, metadata={"absent": 0})
    """The step of its trunk that the run started from: those before were bought with the trunk; 0: trained all itself."""
    rollbacks: list[Rollback] = field(default_factory=list, metadata={"absent": []})
    """Loss spikes that were rolled back: the run did not read the batches that another of its seed reads."""

    @property
    def bought_flops(self) -> float:
        """Exact FLOPs of the steps that this run trained itself."""
        return training_flops(self.spec.shape, self.tokens - self.spec.tokens_in(self.start_step))

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        return from_dict(cls, read_versioned(path, "run record", cls.VERSION))

    def write_once(self, path: Path) -> bool:
        """Write record.json unless it exists; the first writer wins. Returns whether this call made it."""
        return write_json_once(path, {"schema_version": self.VERSION, **to_dict(self)})


@dataclass(frozen=True)
class Plan:
    """plan.json: the runs that a sweep consists of."""

    VERSION = 1
    name: str
    grid: str
    """Name of the grid that made it."""
    overrides: list[str]
    """The command line that made it."""
    created: str
    """UTC time, ISO 8601."""
    commit: str | None
    family: ShapeFamily
    """Shapes that the sweep ranges over; a forecast snaps to it."""
    recipe: dict[str, Any]
    """The hyperparameter rule that set LR and batch, as configured; a forecast applies it at the target."""
    data: DataManifest
    runs: list[RunSpec] = field(default_factory=list)
    further_data: list[DataManifest] = field(default_factory=list, metadata={"absent": []})
    """The same text for the other vocabularies, where the runs have several."""

    @property
    def corpora(self) -> list[DataManifest]:
        """One a vocabulary."""
        return [self.data, *self.further_data]

    def prepared(self, spec: RunSpec) -> RunSpec:
        """The run on this plan's corpus of its vocabulary; as it is where there is none."""
        digests = {corpus.vocab_size: corpus.digest for corpus in self.corpora}
        digest = digests.get(spec.shape.vocab_size)
        return spec if digest is None else spec.with_digest(digest)

    @classmethod
    def read(cls, path: Path) -> Plan:
        return from_dict(cls, read_versioned(path, "sweep plan", cls.VERSION))

    def write(self, path: Path) -> None:
        write_json(path, {"schema_version": self.VERSION, **to_dict(self)})


@dataclass(frozen=True)
class CurvePoint:
    """The forecast's held-out loss at one point of the flagship's run, nats per token."""

    tokens: int
    loss: float
    interval_50: tuple[float, float]
    interval_90: tuple[float, float]


@dataclass(frozen=True)
class Channel:
    """What a quantity should do along the flagship's run, in equal windows of it; what analysis.watch holds it against."""

    name: Literal["train_loss", "grad_norm", "scatter"]
    """ln of the training loss, of the gradient norm, of the training loss's scatter between steps × √batch_tokens."""
    mean: list[float]
    """Expected, one a window."""
    sd: list[float]
    """Standard deviation of a run about it, one a window."""
    drift: list[float]
    """Standard deviation of what the runs' trend with compute may add, one a window."""
    level_sd: float
    """Standard deviation of a shift of all windows."""
    memory: float
    """Windows in which a deviation falls to 1/e."""
    white: float
    """Share of sd² that is a window's own noise."""


@dataclass(frozen=True)
class Forecast:
    """forecast.json: sealed before the flagship starts."""

    VERSION = 1
    created: str
    """UTC time, ISO 8601."""
    sweep: str
    """Where the runs came from, as given."""
    run_ids: list[str]
    """The runs that the law was fitted on."""
    laws: list[dict[str, Any]]
    """Each law used: name, weight, parameters, emphasis on the larger runs (None: all alike), loss of residuals."""
    convention: dict[str, str]
    """params (total | non_embedding | body_head), flops (exact | …), loss unit (nats_per_token)."""
    target_flops: float
    n_params: float
    """Continuous N*, in the convention above."""
    n_tokens: float
    """Continuous D*."""
    spec: RunSpec
    """The snapped shape, its tokens and recipe: what the flagship trains."""
    loss: float
    """Held-out loss forecast for `spec`, nats per token."""
    interval_50: tuple[float, float]
    interval_90: tuple[float, float]
    curve: list[CurvePoint]
    """Loss along the run; empty when the sweep's curves are not at hand."""
    extrapolation_ratio: float
    """spec.flops over the largest fitted run's."""
    extrapolation_colour: Literal["green", "amber", "red"]
    """≤30× green, ≤300× amber, more red."""
    notes: list[str]
    """Warnings, runs left out and why."""
    channels: list[Channel] = field(default_factory=list, metadata={"absent": []})
    """What the watch expects; empty when the sweep's metrics are not at hand."""
    limits: dict[str, Any] = field(default_factory=dict, metadata={"absent": {}})
    """What bounded `spec` beside target_flops, by the names of analysis.decide.limits.Limits; max_params in the convention above."""
    seal: str = ""
    """sha256 over the canonical JSON of all the other fields."""

    def computed_seal(self) -> str:
        """sha256 over the canonical JSON of every field but the seal."""
        fields = to_dict(self)
        del fields["seal"]
        return hashlib.sha256(canonical_json(fields).encode()).hexdigest()

    @classmethod
    def read(cls, path: Path) -> Forecast:
        """Read and check the seal.

        Raises:
            InputError: unreadable, newer schema, or changed after it was sealed.
        """
        forecast = from_dict(cls, read_versioned(path, "forecast", cls.VERSION))
        if forecast.seal != forecast.computed_seal():
            raise InputError(
                f"forecast {path} was changed after it was sealed (seal {forecast.seal[:12]}…, content "
                f"{forecast.computed_seal()[:12]}…): make it again with python -m analysis.fit"
            )
        return forecast

    def write(self, path: Path) -> None:
        assert self.seal == self.computed_seal(), "seal a forecast before writing it"
        write_json(path, {"schema_version": self.VERSION, **to_dict(self)})
