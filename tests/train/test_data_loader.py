"""The loader: what each step reads, epochs, the prefetch thread, and the held-out windows."""

import threading
from itertools import islice

import numpy as np
import pytest
import torch

from scaling.errors import InputError
from train.data.loader import BLOCK_TOKENS, Loader, Shuffled, validation_windows

TOKENS = np.arange(1003, dtype="<u2")
"""Token i is i, so a batch says where it was read."""


def test_targets_are_the_next_tokens():
    inputs, targets = Loader(TOKENS, seq_len=8, batch_tokens=32, seed=0).batch(0)
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))


def test_an_epoch_reads_every_window_once_and_borders_move():
    loader = Loader(TOKENS, seq_len=8, batch_tokens=8, seed=3)
    n = loader.order.windows_per_epoch
    assert n == 124
    epochs = [[int(loader.batch(e * n + i)[0][0, 0]) for i in range(n)] for e in range(3)]
    for starts in epochs:
        assert sorted(starts) == list(range(min(starts), min(starts) + 8 * n, 8))
        assert starts != sorted(starts)
    assert len({min(starts) for starts in epochs}) > 1
    assert epochs[0] != epochs[1]


def test_unique_tokens_are_the_first_of_a_fresh_run_in_a_new_order_every_epoch():
    fresh = Loader(TOKENS, 8, 8, seed=3)
    few = Loader(TOKENS, 8, 8, 3, Shuffled(len(TOKENS), 8, [3], unique_tokens=83))
    assert few.order.windows_per_epoch == 10
    epochs = [[int(few.batch(e * 10 + i)[0][0, 0]) for i in range(10)] for e in range(4)]
    assert epochs[0] == [int(fresh.batch(i)[0][0, 0]) for i in range(10)]
    assert max(epochs[0]) > 500  # from all over the shard
    for epoch in epochs[1:]:
        assert sorted(epoch) == sorted(epochs[0])
        assert epoch != epochs[0]
    assert Shuffled(len(TOKENS), 8, [3], unique_tokens=len(TOKENS)).windows_per_epoch == 124
    with pytest.raises(InputError, match="15 tokens, fewer than two windows"):
        Shuffled(len(TOKENS), 8, [3], unique_tokens=15)


def test_a_batch_is_a_function_of_seed_and_step_alone():
    def batches(seed, steps):
        loader = Loader(TOKENS, 8, 40, seed)
        return {step: loader.batch(step)[0] for step in steps}

    forward, backward = batches(1, range(60)), batches(1, reversed(range(60)))  # 60 steps cross two epoch borders
    assert all(torch.equal(forward[s], backward[s]) for s in range(60))
    assert any(not torch.equal(forward[s], b) for s, b in batches(2, range(60)).items())


def test_the_batch_size_does_not_change_the_order():
    small, large = Loader(TOKENS, 8, 8, 0), Loader(TOKENS, 8, 64, 0)
    joined = torch.cat([small.batch(i)[0] for i in range(800)])
    assert torch.equal(joined, torch.cat([large.batch(i)[0] for i in range(100)]))


def test_a_batch_larger_than_an_epoch_is_filled():
    inputs, _ = Loader(TOKENS[:40], seq_len=8, batch_tokens=8 * 11, seed=0).batch(1)
    assert inputs.shape == (11, 8)


def test_the_order_is_the_same_on_every_machine():
    """Pins the contract: a change of these numbers changes what every run trains to (raise CODE_CONTRACT)."""
    assert Loader(TOKENS, 8, 48, 0).batch(0)[0][:, 0].tolist() == PINNED


PINNED = [550, 982, 294, 446, 774, 110]


def test_a_shard_without_two_windows_is_refused():
    assert Loader(TOKENS[:16], 8, 8, 0).batch(5)[1].max() < 16
    with pytest.raises(InputError, match="15 tokens, fewer than two windows of seq_len 8"):
        Loader(TOKENS[:15], 8, 8, 0)


# -- prefetch


def loader_threads():
    return [t for t in threading.enumerate() if t.name == "loader"]


def test_iterate_gives_the_batches_of_the_steps():
    loader = Loader(TOKENS, 8, 40, 0)
    last = 7 + 2 * BLOCK_TOKENS // 40
    got = list(loader.iterate(7, last))
    assert len(got) == last - 7
    again = Loader(TOKENS, 8, 40, 0)
    assert all(torch.equal(b[0], again.batch(s)[0]) for s, b in enumerate(got, 7))
    assert not loader_threads()


def test_leaving_the_iteration_ends_the_thread():
    for _ in range(20):
        batches = Loader(TOKENS, 8, 40, 0).iterate(0, 10**9)
        next(batches)
        batches.close()
    assert not loader_threads()


def test_an_error_while_reading_reaches_the_consumer():
    class Broken(Loader):
        def batch(self, step, steps=1):
            if step:
                raise OSError("disk gone")
            return super().batch(step, steps)

    block = BLOCK_TOKENS // 40
    batches = Broken(TOKENS, 8, 40, 0).iterate(0, 2 * block)
    assert len(list(islice(batches, block))) == block
    with pytest.raises(OSError, match="disk gone"):
        next(batches)
    assert not loader_threads()


# -- held-out windows


def test_held_out_windows_are_spread_over_the_shard():
    batches = list(validation_windows(TOKENS, 8, eval_tokens=80, batch_size=4))
    assert [len(b[0]) for b in batches] == [4, 4, 2]
    starts = torch.cat([b[0][:, 0] for b in batches])
    assert starts.tolist() == [i * 1002 // 10 for i in range(10)]
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in batches)


@pytest.mark.parametrize("n", [9, 10, 16, 17, 100, 1003])
def test_held_out_windows_do_not_overlap_and_stay_inside(n):
    starts = torch.cat([b[0][:, 0] for b in validation_windows(TOKENS[:n], 8, 10**9, 5)])
    assert len(starts) == (n - 1) // 8
    assert (starts.diff() >= 8).all()
    assert starts[-1] + 9 <= n


def test_a_shard_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match="validation shard has 8 tokens"):
        list(validation_windows(TOKENS[:8], 8, 100, 1))
