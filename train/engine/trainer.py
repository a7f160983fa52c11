"""One run in progress: model, optimizers, data and counters, in one process or as one rank of many."""

from __future__ import annotations

import contextlib
import errno
import math
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scaling.branches import check_branch
from scaling.errors import InputError
from scaling.records import Rollback
from scaling.schedule import lr_factor
from scaling.spec import RunSpec
from scaling.sweepdir import RunDir
from train.data.loader import Corpus, Loader
from train.data.tokenizer import EOS
from train.engine import checkpoint
from train.engine.auto import chosen_compile, set_attention
from train.engine.energy import EnergyMeter
from train.engine.evaluation import held_out_bytes_per_token, held_out_loss, source_losses
from train.engine.graphs import CapturedPass, check_graphs
from train.engine.host import Host, check_one_process
from train.engine.optim import UPDATES_EVERY, Optimizers
from train.engine.progress import Progress
from train.engine.spike import Spikes
from train.engine.staging import Writer, staged
from train.model.attention import Packing
from train.model.decoder import Decoder
from train.model.fp8 import check_fp8, use_fp8
from train.model.kernels import set_up

if TYPE_CHECKING:
    from train.engine.parallel.model import ParallelModel
    from train.engine.parallel.world import World
from train.model.experts import follow_load

MOST_SKIPPED = 3
"""Steps in a row without an update, because a gradient is not finite, that end the run as diverged."""
SMOOTHING = 0.9
"""Of the training loss that the divergence stop watches: an exponential mean over about ten steps."""


class Diverged(Exception):
    """The loss or the gradients are not finite, or the loss is far above its minimum; the message says which."""


class Trainer:
    """One run in progress: model, optimizers, data and counters.

    Args:
        world: the ranks that train it together, each with a trainer that is called as the others' are; None: this process.
    """

    model: Decoder | ParallelModel

    def __init__(self, spec: RunSpec, corpus: Corpus, host: Host, world: World | None = None) -> None:
        self.spec, self.corpus, self.host, self.world = spec, corpus, host, world
        self.device = torch.device(host.device)
        if host.cuda_graphs:
            check_graphs(self.device, spec.shape)
        set_attention(spec, host, world)
        if world is None:
            with torch.device("meta"):
                model = Decoder(spec.shape, spec.precision, spec.multipliers)
            self.model = model.to_empty(device=self.device)
            self.model.initialise(spec.seed)
            if spec.data.document_mask:
                self.model.packing = Packing.on(self.device, self.model.dtype, spec.shape.dim_per_head, EOS)
            self.compiled = self._set_up(self.model)
            self.optimizers = Optimizers(self.model, spec.optim, spec.precision, None, spec.multipliers)
        else:
            from train.engine.parallel.model import parallel_model  # seconds: one process never needs it

            check_one_process(spec, host)
            assert host.recompute != "budget", "resolved by the caller"
            self.model = parallel_model(
                spec, host.layout, host.micro_batch_tokens, host.recompute, world, self.device
            )
            self.compiled = chosen_compile(spec, host, spec.shape, world, self.model.uncompiled) != "none"
            if self.compiled:
                self.model.compile()
            self.optimizers = Optimizers(self.model, spec.optim, spec.precision, self.model.mesh, spec.multipliers)
        self.energy = EnergyMeter(self.device)
        self.writer = Writer()
        self.apart = None if world is None else world.apart
        self.loader = Loader.of(spec, corpus)
        if not isinstance(self.model, Decoder):
            self.loader.rows = self.model.mesh.rows
        self.source_losses: dict[str, float] = {}
        self.progress = Progress()
        self.spikes = None if spec.rollback is None else Spikes(spec.rollback)
        self.parameters = [parameter for _, parameter in self.model.named_parameters()]
        self.captured = CapturedPass(self._pass, self.parameters, self._packing) if host.cuda_graphs else None

    def _set_up(self, model: Decoder) -> bool:
        """Recomputation and compilation as the host asks. Returns whether it is compiled."""
        host = self.host
        compiled = chosen_compile(self.spec, host, model.shape, None)
        if self.spec.precision == "fp8":
            check_fp8(self.device)
            use_fp8(model.model.layers)
        assert host.recompute != "budget", "resolved by the caller"
        set_up(model, compiled, host.recompute, host.recompute_layers)
        return compiled != "none"

    @property
    def leads(self) -> bool:
        """Whether this process writes the run's files."""
        return self.world is None or self.world.leads

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on; of a rank among others its parts of the tensors, by name."""
        if isinstance(self.model, Decoder):
            model, optimizers = self.model.state_dict(), self.optimizers.state_dict()
        else:
            model = self.model.state()
            optimizers = {"named": self.optimizers.named_states(), "steps": self.optimizers.steps}
        return {
            "run_id": self.spec.run_id,
            "model": model,
            "optimizers": optimizers,
            "progress": vars(self.progress),
            "rng": torch.get_rng_state(),
            **({"spikes": self.spikes.state_dict()} if self.spikes else {}),
        }

    def _load(self, state: dict[str, Any]) -> None:
        if self.spikes is not None:
            self.spikes.load_state_dict(state["spikes"])
        if isinstance(self.model, Decoder):
            self.model.load_state_dict(state["model"])
            self.optimizers.load_state_dict(state["optimizers"])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["rng"])

    def _check_run(self, state: dict[str, Any], run_id: str) -> None:
        if state["run_id"] != run_id:
            raise InputError(
                f"checkpoint of run {state['run_id']} in the folder of run {self.spec.run_id}: delete it"
            )

    def save(self, folder: Path, keep: bool = False) -> None:
        """Copy the state of this step and have a thread write its checkpoint, for good where branches start from it.

        The run waits for the checkpoint before, if that is still being written. Where the disk is full the checkpoints that
        were there are untouched, and the run goes on.

        Args:
            keep: for good in any case.
        """
        step = self.progress.step
        path = checkpoint.checkpoint_path(folder, step, keep or step in self.spec.keep_steps)
        spared = [] if self.spikes is None else self._checkpoints(folder, self.spikes.targets(step))
        self.writer.wait()
        state = staged({"step": step, **self.state_dict()})

        def write() -> None:
            try:
                self._write(path, state, spared)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if self.leads:
                    print(f"no space for a checkpoint at step {step}: keeping the one before", file=sys.stderr)

        self.writer.start(write)

    def _write(self, path: Path, state: dict[str, Any], spared: Sequence[Path]) -> None:
        if self.apart is None:
            checkpoint.save(path, state, spared)
            return
        from train.engine.parallel import checkpoint as sharded

        sharded.save(path, state, self.apart)
        if self.leads:
            checkpoint.prune(path.parent, checkpoint.KEEP, spared)

    @staticmethod
    def _checkpoints(folder: Path, steps: Sequence[int]) -> list[Path]:
        return [checkpoint.checkpoint_path(folder, step) for step in steps]

    @property
    def skipped_batches(self) -> int:
        """Batches of the run's order that rollbacks passed over: step s reads batch s + this."""
        return 0 if self.spikes is None else self.spikes.skipped_batches

    def is_rollback_step(self) -> bool:
        """Whether the step just done is one that a spike may go back to."""
        return self.spec.rollback is not None and self.progress.step % self.spec.rollback.every_steps == 0

    def spiked(self, loss: float) -> Rollback | None:
        """Take in the loss of the step just done, where the run rolls back spikes. Returns what to do where it is one."""
        return None if self.spikes is None else self.spikes.see(self.progress.step, loss)

    def roll_back(self, rollback: Rollback, folder: Path) -> bool:
        """Go back to a checkpoint, with the reading ahead of it, and save that. Returns whether there was one to go back to.

        The data, clocks and rollbacks so far stay as they are; all else is the checkpoint's.
        """
        assert self.spikes is not None
        self.writer.wait()
        rollbacks, now = [*self.spikes.rollbacks, rollback], self.progress
        (path,) = self._checkpoints(folder, [rollback.to_step])
        if not self.restore([path] if path.exists() else [], self.spec.run_id):
            if self.leads:
                print(f"{rollback}: no checkpoint to go back to, going on", file=sys.stderr)
            return False
        self.spikes.rollbacks = rollbacks
        for clock in ("train_s", "wall_s", "data_wait_s", "comm_wait_s"):
            setattr(self.progress, clock, getattr(now, clock))
        if self.leads:  # before the save: a run that is killed here comes to the same spike again
            checkpoint.delete_after(folder, rollback.to_step)
            print(
                f"run {self.spec.run_id}: {rollback}: back to step {rollback.to_step}, passing over "
                f"{rollback.skipped_batches} batches; rollback {len(rollbacks)} of at most {self.spikes.spec.limit}",
                file=sys.stderr,
            )
        return True

    def restore(self, paths: Sequence[Path], run_id: str) -> bool:
        """Go on from the first of these checkpoints that can be read. Returns whether there was one.

        Args:
            run_id: of the run that wrote them.
        Raises:
            InputError: they are another run's.
        """
        if self.world is None:
            state = checkpoint.load_first(paths)
        else:
            from train.engine.parallel import checkpoint as sharded

            assert not isinstance(self.model, Decoder)
            state = sharded.load(paths, self.state_dict(), self.spec, self.model.mesh)
            if state is not None:
                self.optimizers.set_steps(state["steps"])
        if state is None:
            return False
        self._check_run(state, run_id)
        self._load(state)
        return True

    def branch_off(self, run: RunDir) -> None:
        """A branch starts where its trunk was at the branch point, or at an earlier point that was kept, or at step 0.

        Args:
            run: the branch's folder, beside its trunk's.
        Raises:
            InputError: the trunk is another run in more than its length.
            Diverged: the trunk did, before the branch point.
        """
        spec, step = self.spec, self.spec.parent_step
        if spec.parent_run_id is None or step is None:
            return
        trunk = run.sibling(spec.parent_run_id)
        record = trunk.record()
        if trunk.spec_json.exists():
            check_branch(spec, trunk.spec())
        if record is not None and record.status == "diverged" and record.tokens <= step * spec.batch_tokens:
            self.progress.step = self.progress.start_step = record.tokens // spec.batch_tokens
            raise Diverged(f"its trunk {record.run_id} diverged: {record.reason}")
        if not self.restore(checkpoint.kept(trunk.checkpoints, step), trunk.path.name):
            if self.leads:
                print(
                    f"run {spec.run_id}: its trunk {trunk.path.name} has no checkpoint at step {step} or before: "
                    "training it from its first step",
                    file=sys.stderr,
                )
            return
        p = self.progress
        p.start_step, p.train_s, p.wall_s, p.data_wait_s, p.comm_wait_s = p.step, 0.0, 0.0, 0.0, None
        tail = spec.steps - self.tail_steps
        p.tail_loss = sum(row["train_loss"] for row in trunk.metrics() if tail < row["step"] <= p.step)

    def step(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> dict[str, float]:
        """One optimizer step on one batch; without an update where a gradient is not finite.

        Returns:
            The mean training loss, the gradient norm, the learning rate, every UPDATES_EVERY steps update_ratio_GROUP;
            skipped: 1 when there was no update.
        Raises:
            Diverged: there was none in the last MOST_SKIPPED steps: it is the weights, not the batch.
        """
        spec, after = self.spec, self.spec.tokens_in(self.progress.step + 1)
        tokens = after - spec.tokens_in(self.progress.step)
        scale = spec.batch_tokens / tokens
        self.model.make_room(inputs_BT)
        if isinstance(self.model, Decoder):
            loss, norm = self._gradients(self.model, inputs_BT, targets_BT, scale)
        else:
            loss, norm = self.model.gradients(inputs_BT, targets_BT, spec.optim.clip_norm, scale)
        factor = lr_factor(spec.schedule, after, spec.tokens)
        row = {"train_loss": loss / tokens, "grad_norm": norm, "lr": spec.optim.peak_lr * factor}
        if math.isfinite(norm):
            self.optimizers.measures = (self.progress.step + 1) % UPDATES_EVERY == 0
            self.optimizers.step(factor)
            row |= self.optimizers.update_ratios()
            self.progress.skipped_in_a_row = 0
        else:
            self.optimizers.clear_gradients()
            self.progress.skipped_in_a_row += 1
            row["skipped"] = 1
        if spec.shape.experts:
            row |= follow_load(self.model) if isinstance(self.model, Decoder) else self.model.follow_load()
        self.progress.step += 1
        if self.progress.skipped_in_a_row == MOST_SKIPPED:
            raise Diverged(f"gradients are not finite in the {MOST_SKIPPED} steps up to {self.progress.step}")
        return row

    def _gradients(
        self, model: Decoder, inputs_BT: torch.Tensor, targets_BT: torch.Tensor, scale: float
    ) -> tuple[float, float]:
        """Gradients of the mean loss, clipped. Returns the summed loss and the norm before clipping.

        Args:
            scale: the run's batch_tokens over those of this batch.
        """
        spec = self.spec
        micro = max(1, self.host.micro_batch_tokens // spec.shape.seq_len)
        if self.host.member is not None:
            batch = inputs_BT.to(self.device), targets_BT.to(self.device)
            loss = self.host.member.gradients(spec, model, *batch, micro)
        else:
            loss = torch.zeros((), device=self.device)
            if self.captured is not None:
                self.captured.clear_gradients()
            run = self.captured or self._pass
            for inputs, targets in zip(inputs_BT.split(micro), targets_BT.split(micro), strict=True):
                loss += run(inputs.to(self.device), targets.to(self.device))
        if scale != 1.0:
            torch._foreach_mul_(
                [parameter.grad for parameter in self.parameters if parameter.grad is not None], scale
            )
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, spec.optim.clip_norm)
        return float(loss), float(norm)

    def _packing(self) -> Packing | None:
        assert isinstance(self.model, Decoder)
        return self.model.packing

    def _pass(self, inputs_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Add a micro-batch's share of the gradients of the mean loss. Returns its summed loss."""
        assert isinstance(self.model, Decoder)
        total = self.model.loss(inputs_BT, targets_BT, self.spec.optim.z_loss)
        (total / self.spec.batch_tokens).backward()
        return total.detach()

    def watch_loss(self, loss: float) -> None:
        """Track the smoothed training loss.

        Raises:
            Diverged: not finite, or above divergence_factor × its running minimum.
        """
        p = self.progress
        if not math.isfinite(loss):
            raise Diverged(f"training loss is {loss} at step {p.step}")
        p.smooth_loss = loss if p.smooth_loss is None else SMOOTHING * p.smooth_loss + (1 - SMOOTHING) * loss
        p.lowest_loss = min(p.lowest_loss, p.smooth_loss)
        if p.smooth_loss > self.spec.divergence_factor * p.lowest_loss:
            limit = f"{self.spec.divergence_factor:g} × its minimum {p.lowest_loss:.3f}"
            raise Diverged(f"training loss {p.smooth_loss:.3f} at step {p.step} is above {limit}")
        if p.step > self.spec.steps - self.tail_steps:
            p.tail_loss += loss

    @property
    def tail_steps(self) -> int:
        """Steps whose mean training loss is recorded: the last tenth."""
        return max(1, self.spec.steps // 10)

    def evaluate(self) -> float:
        """Held-out loss, nats per token; that of each source of a mixture becomes `source_losses`."""
        on = (self.model, self.corpus, self.spec.eval.tokens, self.device)
        with torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext():
            self.source_losses = source_losses(*on)
            return held_out_loss(*on)

    @cached_property
    def bytes_per_token(self) -> float:
        """Of the held-out tokens that `evaluate` predicts."""
        return held_out_bytes_per_token(self.corpus, self.spec.shape.seq_len, self.spec.eval.tokens)

    def is_evaluation_step(self) -> bool:
        """Whether the step just done is one of the run's evenly spaced evaluations; the last step is one."""
        step, points = self.progress.step, self.host.eval_points or self.spec.eval.points
        return step * points // self.spec.steps > (step - 1) * points // self.spec.steps
