"""The training loop: what it computes, and that nothing is lost or done twice when it is stopped, by whatever."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from scaling.errors import InputError
from scaling.records import DataManifest
from scaling.schedule import lr_factor
from scaling.spec import RunSpec, ScheduleSpec
from scaling.sweepdir import LostLease, RunDir
from train.data.loader import validation_windows
from train.data.shards import Corpus
from train.engine import Host, checkpoint, train
from train.engine.loop import Trainer
from train.engine.muon import Muon
from train.engine.optim import Optimizers
from train.model.decoder import Decoder

ROOT = Path(__file__).resolve().parents[2]
Specs = Callable[..., RunSpec]


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "train.run", str(folder), *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(run: RunDir, step: int, process: subprocess.Popen[str]) -> None:
    """Until the newest checkpoint is of this step or a later one."""
    deadline = time.monotonic() + 60
    while not any(int(p.stem.partition("-")[2]) >= step for p in run.checkpoints.glob("step-*.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint within a minute"
        time.sleep(0.005)


# --- what it computes


def test_a_run_learns_and_its_record_says_what_it_was(
    make_spec: Specs, manifest: DataManifest, tmp_path: Path
) -> None:
    spec = make_spec(steps=150)
    run = RunDir(tmp_path / spec.run_id)
    record = train(spec, run)
    rows = run.metrics()
    assert record == run.record()
    assert record.status == "ok"
    assert [row["step"] for row in rows] == list(range(1, 151))
    assert rows[0]["train_loss"] == pytest.approx(math.log(spec.shape.vocab_size), rel=0.15)
    assert record.loss == rows[-1]["val_loss"] < 0.8 * rows[0]["train_loss"]
    assert sum("val_loss" in row for row in rows) == spec.eval.points
    corpus = Corpus.open(spec.data.digest)
    predicted = list(validation_windows(corpus.validation, spec.shape.seq_len, spec.eval.tokens, 1))
    text = b"".join(
        corpus.tokenizer.decode(t.flatten().tolist(), skip_special_tokens=True).encode() for _, t in predicted
    )
    tokens = sum(t.numel() for _, t in predicted)
    assert record.bits_per_byte == pytest.approx(record.loss / math.log(2) * tokens / len(text), rel=0.02)
    assert record.flops["exact"] == spec.flops
    assert record.params["body_head"] == spec.params.body_head
    assert record.tokens == spec.tokens == rows[-1]["tokens"]
    assert record.epochs == spec.tokens / manifest.train_tokens
    assert 0 < record.train_s <= record.wall_s
    assert len(list(run.checkpoints.glob("*.pt"))) == 1  # the trained model


def test_a_finished_run_is_not_trained_again(make_spec: Specs, tmp_path: Path) -> None:
    spec = make_spec(steps=10)
    run = RunDir(tmp_path / "run")
    first = train(spec, run)
    assert train(spec, run) == first
    assert run.last_attempt() == 1


@pytest.mark.parametrize(("optim", "kind"), [("adamw", "cosine"), ("muon", "linear")])
def test_other_optimizers_and_schedules_learn(make_spec: Specs, tmp_path: Path, optim: str, kind: str) -> None:
    record = train(make_spec(optim=optim, kind=kind, peak_lr=0.01), RunDir(tmp_path / "run"))
    assert record.status == "ok"
    assert record.loss < 5.0  # ln 300 = 5.70


def test_accumulated_gradients_are_the_batch_gradient(make_spec: Specs) -> None:
    spec = make_spec()
    corpus = Corpus.open(spec.data.digest)
    trainers = [Trainer(spec, corpus, Host(micro_batch_tokens=tokens)) for tokens in (256, 96, 32)]
    for step in range(5):
        rows = [t.step(*t.loader.batch(step)) for t in trainers]
        for row in rows[1:]:
            assert row["train_loss"] == pytest.approx(rows[0]["train_loss"], abs=2e-6)
            assert row["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4)


def test_gradients_are_clipped_to_the_norm(make_spec: Specs) -> None:
    spec = make_spec(clip_norm=0.01)
    trainer = Trainer(spec, Corpus.open(spec.data.digest), Host())
    seen = []
    step = trainer.optimizers.step

    def look(factor: float) -> None:
        seen.append(torch.cat([p.grad.flatten() for p in trainer.parameters]).norm().item())
        step(factor)

    trainer.optimizers.step = look  # type: ignore[method-assign]
    row = trainer.step(*trainer.loader.batch(0))
    assert row["grad_norm"] > 0.1  # reported before clipping
    assert seen[0] == pytest.approx(0.01, rel=1e-3)


def test_a_step_whose_gradients_are_not_finite_is_skipped(make_spec: Specs) -> None:
    spec = make_spec(z_loss=1e39)  # infinite in fp32, in the gradient alone
    trainer = Trainer(spec, Corpus.open(spec.data.digest), Host())
    before = [parameter.clone() for parameter in trainer.parameters]
    row = trainer.step(*trainer.loader.batch(0))
    assert row["skipped"] == 1
    assert math.isfinite(row["train_loss"])
    assert not math.isfinite(row["grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    assert all(parameter.grad is None for parameter in trainer.parameters)
    assert trainer.progress.step == 1


def test_batched_muon_is_torchs() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(s)) for s in [(32, 32), (32, 32), (88, 32), (32, 88), (32, 8)]]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    batched = Muon(ours, momentum=0.9, weight_decay=0.1, dtype=torch.bfloat16)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        batched.step(0.02)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_norms_and_embeddings_do_not_decay(make_spec: Specs) -> None:
    spec = make_spec(weight_decay=0.5, peak_lr=0.1, optim="adamw")
    model = Decoder(spec.shape)
    model.initialise(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Optimizers(model, spec.optim, "fp32").step(1.0)
    for name, parameter in model.named_parameters():
        factor = 1.0 if "norm" in name or "embed" in name else 0.95
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_schedules() -> None:
    def at(schedule: ScheduleSpec, *tokens: float) -> list[float]:
        return [lr_factor(schedule, t, 1000) for t in tokens]

    wsd = ScheduleSpec("wsd", 100, decay_fraction=0.2)
    assert at(wsd, 50, 100, 500, 800) == [0.5, 1.0, 1.0, 1.0]
    assert at(wsd, 850, 1000) == pytest.approx([0.5, 0.0])  # 1 − √¼
    linear = dataclasses.replace(wsd, decay_shape="linear", final_lr_ratio=0.1)
    assert at(linear, 900, 1000) == pytest.approx([0.55, 0.1])
    assert at(ScheduleSpec("cosine", 100), 100, 550, 1000) == pytest.approx([1.0, 0.5, 0.0])
    assert at(ScheduleSpec("linear", 0, final_lr_ratio=0.2), 500, 1000) == pytest.approx([0.6, 0.2])


# --- stopped and resumed


@pytest.fixture
def undisturbed(make_spec: Specs, tmp_path: Path) -> tuple[RunSpec, float, list[float]]:
    """A run of about two seconds, its final loss, and its training losses."""
    spec = make_spec(width=32, steps=150)
    run = RunDir(tmp_path / "undisturbed")
    record = train(spec, run)
    assert record.loss is not None
    return spec, record.loss, [row["train_loss"] for row in run.metrics()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    undisturbed: tuple[RunSpec, float, list[float]], tmp_path: Path, how: signal.Signals
) -> None:
    spec, loss, losses = undisturbed
    run = RunDir(tmp_path / "disturbed")
    run.create(spec)
    process = start(run.path, "--checkpoint-every", "0.02")
    wait_for_step(run, 20, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (-how if how == signal.SIGKILL else 130), errors
    assert run.record() is None
    record = train(spec, run)
    assert record.attempts == 2
    assert run.attempt_dir(2).exists()
    first = [row["step"] for row in run.metrics()]
    assert first == list(range(1, 151))  # each step once in the merged metrics
    assert [row["train_loss"] for row in run.metrics()] == losses
    assert record.loss == loss


def test_killed_between_last_checkpoint_and_record(
    undisturbed: tuple[RunSpec, float, list[float]], tmp_path: Path
) -> None:
    spec, loss, _ = undisturbed
    done = RunDir(tmp_path / "undisturbed")
    done.record_json.unlink()
    assert train(spec, done).loss == loss


def test_a_spoilt_checkpoint_is_passed_over(
    undisturbed: tuple[RunSpec, float, list[float]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec, loss, _ = undisturbed
    run = RunDir(tmp_path / "spoilt")
    run.create(spec)
    process = start(run.path, "--checkpoint-every", "0.02")
    wait_for_step(run, 20, process)
    process.kill()
    process.communicate()
    newest = max(run.checkpoints.glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-2000])
    assert train(spec, run).loss == loss
    assert f"{newest.name} cannot be read" in capfd.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="a full disk is a small tmpfs, which root mounts")
def test_a_full_disk_keeps_the_old_checkpoint(make_spec: Specs, tmp_path: Path) -> None:
    spec = make_spec(width=32, steps=40)
    run = RunDir(tmp_path / "run")
    run.create(spec)
    run.checkpoints.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(run.checkpoints)])
    if mounted.returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        trainer = Trainer(spec, Corpus.open(spec.data.digest), Host())
        first, second = (checkpoint.checkpoint_path(run.checkpoints, step) for step in (1, 2))
        checkpoint.save(first, {"step": 1, **trainer.state_dict()})
        (run.checkpoints / "filler").write_bytes(b"x" * (700 * 1024 - first.stat().st_size - 100 * 1024))
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(second, {"step": 2, **trainer.state_dict()})
        assert sorted(p.name for p in run.checkpoints.iterdir()) == ["filler", first.name]
        state = checkpoint.load_latest(run.checkpoints)
        assert state is not None
        assert state["step"] == 1
        process = start(run.path, "--checkpoint-every", "0")  # the run itself goes on without new checkpoints
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "no space for a checkpoint" in errors
        assert run.record() is not None
    finally:
        subprocess.run(["umount", str(run.checkpoints)], check=True)


def test_two_processes_on_one_run_train_it_once(make_spec: Specs, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create(make_spec(width=32, steps=150))
    both = [start(run.path) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert run.last_attempt() == 1
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 0], [0, 2])  # the second came after the end, or was told that the run is taken
    if codes == [0, 2]:
        assert any("is being trained by another process" in errors for _, errors in outputs)


def test_a_superseded_copy_fences_itself(make_spec: Specs, tmp_path: Path) -> None:
    spec = make_spec(steps=20)
    run = RunDir(tmp_path / "run")
    run.create(spec)
    lease = run.acquire()
    assert lease is not None
    (run.attempt_dir(2)).mkdir()  # another host took the run
    with pytest.raises(LostLease, match="attempt 1 was superseded"):
        train(spec, run, Host(checkpoint_every_s=0), lease)
    assert not run.record_json.exists()
    assert not list(run.checkpoints.glob("*"))


# --- divergence, and input that cannot be used


def test_a_run_that_blows_up_is_recorded_as_diverged(make_spec: Specs, tmp_path: Path) -> None:
    record = train(make_spec(peak_lr=50.0, optim="adamw", steps=80), RunDir(tmp_path / "run"))
    assert record.status == "diverged"
    assert record.loss is None
    assert record.reason is not None
    assert "step" in record.reason
    assert train(record.spec, RunDir(tmp_path / "run")) == record  # final: not tried again


def test_loss_that_is_not_finite_diverges(make_spec: Specs) -> None:
    from train.engine.loop import Diverged

    spec = make_spec()
    trainer = Trainer(spec, Corpus.open(spec.data.digest), Host())
    trainer.watch_loss(3.0)
    with pytest.raises(Diverged, match="training loss is nan"):
        trainer.watch_loss(math.nan)
    for _ in range(8):
        trainer.watch_loss(6.5)
    with pytest.raises(Diverged, match=r"above 2 × its minimum 3.000"):
        trainer.watch_loss(60.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 1000}, "tokens 1000 is not a multiple of batch_tokens 256: use 1024"),
        ({"batch_tokens": 100}, "batch_tokens 100 is not a multiple of seq_len 32: use 96"),
        ({"divergence_factor": 1.0}, "must be above 1"),
        ({"contract": 99}, "planned for code contract 99"),
    ],
)
def test_specs_that_cannot_be(make_spec: Specs, change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_spec(**change)


def test_more_epochs_than_allowed_are_refused(make_spec: Specs, manifest: DataManifest, tmp_path: Path) -> None:
    steps = 2 * manifest.train_tokens // 256
    with pytest.raises(InputError, match=r"2\.00 epochs of the corpus's \d+: above data.max_epochs 1"):
        train(make_spec(steps=steps), RunDir(tmp_path / "run"))


def test_a_checkpoint_of_another_run_is_refused(make_spec: Specs, tmp_path: Path) -> None:
    spec = make_spec(steps=10)
    train(spec, RunDir(tmp_path / "a"))
    for other in (make_spec(steps=11), make_spec(width=24, steps=10)):
        run = RunDir(tmp_path / other.run_id)
        run.create(other)
        shutil.copytree(tmp_path / "a" / "checkpoints", run.checkpoints)
        with pytest.raises(InputError, match=f"checkpoint of run {spec.run_id} in the folder of run {other.run_id}"):
            train(other, run)


def test_run_command_refuses_bad_input_in_one_line(tmp_path: Path) -> None:
    for arguments in ([], [str(tmp_path / "nothing")], [str(tmp_path), "--sweep", str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, "-m", "train.run", *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_wandb_offline_mirrors_the_run(make_spec: Specs, tmp_path: Path) -> None:
    spec = make_spec(steps=10)
    run = RunDir(tmp_path / "sweep" / "runs" / spec.run_id)
    run.create(spec)
    process = start(run.path, "--wandb", "offline")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    (file,) = run.attempt_dir(1).glob(f"wandb/offline-run-*-{spec.run_id}/run-{spec.run_id}.wandb")
    assert file.read_bytes().count(b"train_loss") >= 10
