"""Batches whose content is a function of (seed, step) alone, so that a resumed run reads what it would have read."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from scaling.errors import InputError
from scaling.mixture import Mixture
from scaling.records import SourceManifest
from scaling.spec import RunSpec
from train.data.shards import Corpus

__all__ = ["Corpus", "Loader", "validation_windows"]

BLOCK_TOKENS = 1 << 14
"""Tokens that the reading thread gathers at a time."""

Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs and targets, int64 (B, T); targets are the inputs one token later."""


class Shuffled:
    """The windows of a stretch of tokens, seq_len + 1 at stride seq_len, in a new random order every epoch, endlessly.

    Epoch e reads all its windows once, in the order of a permutation seeded by (seed…, e), from a first token that is
    also seeded, so that window borders move. Memory: one permutation. Of few unique tokens the first windows of epoch 0 are
    all there is, and each epoch has them in a new order: text from all over the corpus, as a fresh run reads it.
    """

    def __init__(
        self,
        n_tokens: int,
        seq_len: int,
        seed: Sequence[int],
        what: str = "the training shard",
        unique_tokens: int | None = None,
    ) -> None:
        """
        Raises:
            InputError: the stretch, or its unique tokens, are shorter than two windows.
        """
        self.seq_len = seq_len
        self.seed = list(seed)
        self.windows_per_epoch = n_tokens // seq_len - 1  # one less, to leave room for the epoch's first token
        if min(self.windows_per_epoch, (unique_tokens or n_tokens) // seq_len - 1) < 1:
            raise InputError(
                f"{what} has {min(n_tokens, unique_tokens or n_tokens)} tokens, fewer than two windows of seq_len "
                f"{seq_len}: use a shorter seq_len or more text"
            )
        self._few: NDArray[np.int64] | None = None
        if unique_tokens is not None and unique_tokens // seq_len < self.windows_per_epoch:
            self._few = self._permuted(0)[: unique_tokens // seq_len]
            self.windows_per_epoch = len(self._few)
        self._epoch = -1
        self._starts = np.empty(0, np.int64)

    def starts(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """First token of each of these windows of the endless sequence of epochs."""
        epochs, positions = np.divmod(windows, self.windows_per_epoch)
        out = np.empty_like(windows)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._epoch_starts(int(epoch))[positions[here]]
        return out

    def _epoch_starts(self, epoch: int) -> NDArray[np.int64]:
        """First token of each of the epoch's windows, in reading order, (windows_per_epoch,)."""
        if epoch != self._epoch:
            if self._few is None:
                self._starts = self._permuted(epoch)
            else:
                self._starts = self._few if epoch == 0 else self._generator(epoch).permutation(self._few)
            self._epoch = epoch
        return self._starts

    def _permuted(self, epoch: int) -> NDArray[np.int64]:
        rng = self._generator(epoch)
        offset = rng.integers(self.seq_len)
        return rng.permutation(self.windows_per_epoch) * self.seq_len + offset

    def _generator(self, epoch: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([*self.seed, epoch]))


class Mixed:
    """Windows of several sources in the proportions of a mixture; of each source in the order of its own Shuffled."""

    def __init__(
        self, sources: Sequence[SourceManifest], mixture: Mixture, seq_len: int, seed: int, windows: int
    ) -> None:
        """
        Args:
            sources: in the order of the shard, and of `mixture.sources`.
            windows: of the whole run.
        """
        self.offsets = np.cumsum([0, *(source.train_tokens for source in sources)])
        self.shuffled = {
            i: Shuffled(source.train_tokens, seq_len, [seed, i + 1], f"source {source.name}")
            for i, source in enumerate(sources)
            if any(block.quotas[i] for block in mixture.blocks)
        }
        self.anneal_from = mixture.anneal_from(windows)
        self.before = mixture.blocks[0].read(self.anneal_from)
        self.blocks = [
            (np.array(block.order), np.array(block.ranks), np.array(block.quotas)) for block in mixture.blocks
        ]

    def starts(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """First token of each of these windows of the run."""
        out = np.empty_like(windows)
        for phase, (order, ranks, quotas) in enumerate(self.blocks):
            here = np.flatnonzero((windows >= self.anneal_from) == bool(phase))
            blocks, places = np.divmod(windows[here] - phase * self.anneal_from, len(order))
            sources = order[places]
            nth = blocks * quotas[sources] + ranks[places] + phase * np.array(self.before)[sources]
            for source in np.unique(sources):
                mine = sources == source
                out[here[mine]] = self.shuffled[int(source)].starts(nth[mine]) + self.offsets[source]
        return out


class Loader:
    """Training batches: step s reads windows s·B to (s + 1)·B − 1 of the run's order, B = batch_tokens / seq_len; with a ramp
    those of the tokens of its own stage.

    So neither the batch size nor how many processes share a batch changes which windows the first tokens of a run are.
    """

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger],
        seq_len: int,
        batch_tokens: int,
        seed: int,
        order: Shuffled | Mixed | None = None,
        tokens_in: Callable[[int], int] | None = None,
    ) -> None:
        """
        Args:
            tokens: the training shard, (n,); may be memory-mapped.
            seq_len: T.
            batch_tokens: tokens of one optimizer step, a multiple of seq_len.
            seed: of the order.
            order: of the windows; None: all of the shard, shuffled anew every epoch.
            tokens_in: tokens of the run's first steps, by their number; None: batch_tokens a step.
        Raises:
            InputError: the shard is shorter than two windows.
        """
        assert batch_tokens % seq_len == 0, "RunSpec checks this"
        self.tokens = tokens
        self.seq_len = seq_len
        self.batch_size = batch_tokens // seq_len
        self.rows: Callable[[int], slice] = lambda batch_size: slice(None)
        """Of a batch of so many sequences: what this rank reads."""
        self.tokens_in = tokens_in or (lambda steps: steps * batch_tokens)
        self.order: Shuffled | Mixed = order or Shuffled(len(tokens), seq_len, [seed])

    @classmethod
    def of(cls, spec: RunSpec, corpus: Corpus) -> Loader:
        """The batches of a run."""
        shape, mixture = spec.shape, spec.data.mixture
        order: Shuffled | Mixed | None = None
        if mixture is not None:
            windows = spec.tokens // shape.seq_len
            order = Mixed(corpus.manifest.sources, mixture, shape.seq_len, spec.seed, windows)
        elif spec.data.unique_tokens is not None:
            order = Shuffled(len(corpus.train), shape.seq_len, [spec.seed], unique_tokens=spec.data.unique_tokens)
        return cls(corpus.train, shape.seq_len, spec.batch_tokens, spec.seed, order, spec.tokens_in)

    def batch(self, step: int, steps: int = 1) -> Batch:
        """The batch of optimizer step `step`, from 0, or those of several steps from there on, one below another."""
        windows = np.concatenate([self._windows(number) for number in range(step, step + steps)])
        return _gather(self.tokens, self.order.starts(windows), self.seq_len)

    def _windows(self, step: int) -> NDArray[np.int64]:
        """The windows that this rank reads for a step."""
        first, stop = (self.tokens_in(steps) // self.seq_len for steps in (step, step + 1))
        return np.arange(first, stop)[self.rows(stop - first)]

    def iterate(self, start_step: int, stop_step: int, ahead: int = 2) -> Generator[Batch]:
        """The batches of steps start_step to stop_step − 1, read by a thread before their turn.

        It reads small batches several at a time, and up to `ahead` such blocks: for each it takes the interpreter from
        the training thread. It ends with the iteration, however that ends (close the generator, or let it be collected).
        """
        block = max(1, BLOCK_TOKENS // (self.batch_size * self.seq_len))
        ready: queue.Queue[Batch | BaseException] = queue.Queue(ahead)
        stop = threading.Event()

        def put(item: Batch | BaseException) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def read() -> None:
            try:
                for step in range(start_step, stop_step, block):
                    if stop.is_set():
                        return
                    put(self.batch(step, min(block, stop_step - step)))
            except BaseException as error:  # the consumer raises it where it waits
                put(error)

        thread = threading.Thread(target=read, name="loader", daemon=True)
        thread.start()
        try:
            for step in range(start_step, stop_step, block):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                rows = [len(self._windows(number)) for number in range(step, min(step + block, stop_step))]
                yield from zip(*(part.split(rows) for part in item), strict=True)
        finally:
            stop.set()
            thread.join()


def validation_windows(
    tokens: NDArray[np.unsignedinteger], seq_len: int, eval_tokens: int, batch_size: int
) -> Iterator[Batch]:
    """The fixed held-out windows: eval_tokens / seq_len of them, spread evenly over the validation shard.

    They do not overlap, and they span all documents, where the shard's first tokens would be a few long ones.

    Args:
        tokens: the validation shard, (n,).
        seq_len: T.
        eval_tokens: tokens to predict, rounded down to whole windows (at least one); all of the shard if it has fewer.
        batch_size: windows a batch; the last may have fewer.
    Raises:
        InputError: the shard is shorter than one window.
    """
    available = (len(tokens) - 1) // seq_len
    if available < 1:
        raise InputError(
            f"the validation shard has {len(tokens)} tokens, fewer than one window of seq_len {seq_len}: "
            "use a shorter seq_len or more text"
        )
    count = min(max(1, eval_tokens // seq_len), available)
    starts = np.arange(count) * (len(tokens) - 1) // count
    for first in range(0, count, batch_size):
        yield _gather(tokens, starts[first : first + batch_size], seq_len)


def _gather(tokens: NDArray[np.unsignedinteger], starts: NDArray[np.int64], seq_len: int) -> Batch:
    windows = tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)
    return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())
