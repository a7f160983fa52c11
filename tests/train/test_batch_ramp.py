"""A batch that grows in stages: what is read, when, and that a run stopped anywhere goes on as if it had not been."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scaling.accounting import training_flops
from scaling.errors import InputError
from scaling.grid import expand_grid
from scaling.schedule import learning_rates
from scaling.spec import BatchStage, RollbackSpec, RunSpec
from scaling.sweepdir import RunDir
from train.data.loader import Loader
from train.data.shards import Corpus
from train.engine import Host, train
from train.engine.stacked import stack_key
from train.engine.trainer import Trainer

RAMP = (BatchStage(3 * 64, 64), BatchStage(4 * 128, 128))
"""Three steps of 64 tokens, four of 128."""


@pytest.fixture
def ramped(make_spec: Callable[..., RunSpec]) -> RunSpec:
    """The ramp, then 6 steps of 256."""
    return make_spec(tokens=704 + 6 * 256, batch_ramp=RAMP)


def test_steps_and_tokens_are_each_others_inverse(ramped: RunSpec) -> None:
    assert ramped.steps == 3 + 4 + 6
    tokens = [ramped.tokens_in(steps) for steps in range(ramped.steps + 1)]
    assert tokens == [0, 64, 128, 192, 320, 448, 576, 704, 960, 1216, 1472, 1728, 1984, 2240]
    assert [ramped.steps_in(count) for count in tokens] == list(range(14))
    assert [ramped.steps_in(count - 1) for count in tokens[1:]] == list(range(13))
    assert ramped.flops == training_flops(ramped.shape, 2240)
    rates = learning_rates(ramped)
    assert rates[2] == pytest.approx(ramped.optim.peak_lr * 192 / (5 * 256))


def test_it_reads_the_text_that_a_run_of_one_batch_reads(ramped: RunSpec) -> None:
    corpus = Corpus.open(str(ramped.data.digest))
    plain = Loader.of(dataclasses.replace(ramped, batch_ramp=(), tokens=2304), corpus)
    for start in (0, 2, 5, 9):
        got = list(Loader.of(ramped, corpus).iterate(start, ramped.steps))
        sizes = [inputs.numel() for inputs, _ in got]
        assert sizes == [ramped.tokens_in(step + 1) - ramped.tokens_in(step) for step in range(start, 13)]
        first = ramped.tokens_in(start)
        read = torch.cat([inputs for inputs, _ in got]).flatten()
        expected = torch.cat([inputs for inputs, _ in plain.iterate(0, 9)]).flatten()[first : ramped.tokens]
        assert torch.equal(read, expected)


def test_gradients_are_of_the_mean_over_the_steps_own_tokens(ramped: RunSpec) -> None:
    """A stage's step is the step of a run with that batch throughout."""
    corpus = Corpus.open(str(ramped.data.digest))
    small = dataclasses.replace(ramped, batch_ramp=(), batch_tokens=64, tokens=64 * 35)
    rows = []
    for spec in (ramped, small):
        trainer = Trainer(spec, corpus, Host(micro_batch_tokens=32))
        rows.append([trainer.step(*trainer.loader.batch(step)) for step in range(3)])
    for one, other in zip(*rows, strict=True):
        assert one["lr"] == other["lr"]
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("at", [2, 3, 6, 8])
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(ramped: RunSpec, at: int, tmp_path: Path) -> None:
    corpus = Corpus.open(str(ramped.data.digest))
    whole = Trainer(ramped, corpus, Host())
    expected = [whole.step(*batch)["train_loss"] for batch in whole.loader.iterate(0, ramped.steps)]
    first, second = Trainer(ramped, corpus, Host()), Trainer(ramped, corpus, Host())
    losses = [first.step(*batch)["train_loss"] for batch in first.loader.iterate(0, at)]
    first.save(tmp_path)
    first.writer.wait()
    assert second.restore(list(tmp_path.iterdir()), ramped.run_id)
    losses += [second.step(*batch)["train_loss"] for batch in second.loader.iterate(at, ramped.steps)]
    assert losses == expected


def test_the_record_counts_what_was_read(ramped: RunSpec, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    record = train(ramped, run, Host())
    assert record.tokens == ramped.tokens
    assert record.flops["exact"] == record.bought_flops == ramped.flops
    assert [row["tokens"] for row in run.metrics()] == [ramped.tokens_in(step) for step in range(1, 14)]


def test_the_recipe_gives_shares(ramped: RunSpec) -> None:
    plain = [
        "model=smoke",
        "data=stdlib",
        "recipe=fixed",
        "recipe.peak_lr=.01",
        "recipe.batch_tokens=1024",
        "tokens=65536",
    ]
    (spec,) = expand_grid([*plain, "recipe.batch_ramp=[[0.1,0.25],[0.2,0.5]]"]).specs
    assert spec.batch_ramp == (BatchStage(26 * 256, 256), BatchStage(26 * 512, 512))
    assert abs(spec.tokens - 65536) <= 512
    (constant,) = expand_grid(plain).specs
    assert constant.batch_ramp == ()
    assert "batch_ramp" not in constant.to_dict()
    assert RunSpec.from_dict(spec.to_dict()) == spec
    assert len({spec.run_id, constant.run_id}) == 2


def test_what_a_ramp_does_not_go_with(ramped: RunSpec) -> None:
    assert stack_key(ramped) is None
    for change, says in (
        ({"rollback": RollbackSpec()}, "batch_ramp with branches or rollback"),
        ({"keep_steps": (8,)}, "batch_ramp with branches or rollback"),
        ({"batch_ramp": (BatchStage(4096, 64),)}, "must be below the run's"),
        ({"batch_ramp": (BatchStage(80, 40),)}, "no multiple of seq_len 32"),
    ):
        with pytest.raises(InputError, match=says):
            dataclasses.replace(ramped, **change)
    with pytest.raises(InputError, match="a multiple of the second"):
        BatchStage(100, 64)
    with pytest.raises(InputError, match="between 0 and 1"):
        expand_grid(["model=smoke", "tokens=65536", "recipe=steplaw", "recipe.batch_ramp=[[0.1,2]]"])
