"""A checkpoint is written beside training: of the step that asked for it, and whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scaling.shape import ShapeFamily
from scaling.spec import RunSpec
from scaling.sweepdir import RunDir
from train.data.loader import Corpus
from train.engine import Host, checkpoint
from train.engine.staging import Writer, staged
from train.engine.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
KILLED_AS_IT_WRITES = """
import os, signal, sys
from pathlib import Path
from scaling.sweepdir import RunDir
from train.data.loader import Corpus
from train.engine import Host
from train.engine.trainer import Trainer
run = RunDir(Path(sys.argv[1]))
spec = run.spec()
trainer = Trainer(spec, Corpus.open(spec.data.digest), Host(micro_batch_tokens=256))
for step in range(2):
    trainer.step(*trainer.loader.batch(step))
    trainer.writer.wait()
    trainer.save(run.checkpoints)
while not any(path.stat().st_size > 1000 for path in run.checkpoints.glob(".step-000000002*")):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_training_goes_on_while_a_checkpoint_of_before_is_written(
    make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    spec = make_spec()
    trainer = Trainer(spec, Corpus.open(str(spec.data.digest)), Host())
    trainer.step(*trainer.loader.batch(0))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.save(tmp_path)
    trainer.step(*trainer.loader.batch(1))
    trainer.writer.wait()
    state = checkpoint.load_latest(tmp_path)
    assert state is not None
    assert state["step"] == state["progress"]["step"] == 1
    for name, tensor in before.items():
        assert torch.equal(state["model"][name], tensor)
    again = Trainer(spec, Corpus.open(str(spec.data.digest)), Host())
    assert again.restore(checkpoint.newest(tmp_path), spec.run_id)
    again.step(*trainer.loader.batch(1))
    for one, other in zip(again.parameters, trainer.parameters, strict=True):
        assert torch.equal(one, other)


def test_a_copy_shares_memory_where_the_state_does() -> None:
    weight = torch.arange(6.0).view(2, 3).mT
    copy = staged({"a": weight, "b": [weight.detach(), (1, "x")], "c": weight[:1]})
    weight.zero_()
    assert copy["a"].data_ptr() == copy["b"][0].data_ptr() != copy["c"].data_ptr()
    assert copy["a"].stride() == (1, 3)
    assert copy["a"].sum() == 15
    assert copy["b"][1] == (1, "x")


def test_one_write_at_a_time_and_its_error_is_not_lost() -> None:
    writer, may_end, order = Writer(), threading.Event(), []

    def first() -> None:
        may_end.wait()
        order.append(1)

    writer.start(first)
    threading.Timer(0.05, may_end.set).start()
    writer.start(lambda: order.append(2))
    writer.wait()
    assert order == [1, 2]
    writer.start(lambda: os.stat("/nowhere"))
    with pytest.raises(FileNotFoundError):
        writer.start(lambda: order.append(3))
    writer.wait()
    assert order == [1, 2]


def test_killed_as_it_writes_the_checkpoint_before_is_there(
    make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    run.create(make_spec(shape=ShapeFamily(vocab_size=300, seq_len=32, depth=6, n_heads=4).shape(256)))
    done = subprocess.run([sys.executable, "-c", KILLED_AS_IT_WRITES, str(run.path)], cwd=ROOT, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in checkpoint.newest(run.checkpoints)] == ["step-000000001.pt"]
    assert list(run.checkpoints.glob(".step-000000002*"))
    state = checkpoint.load_latest(run.checkpoints)
    assert state is not None
    assert state["step"] == 1
