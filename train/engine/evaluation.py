"""Held-out loss on the fixed set."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch

from scaling.shape import ModelShape
from train.data.loader import Corpus, validation_windows

BATCH_TOKENS = 8192


class Evaluated(Protocol):
    """A model: the decoder, or a rank's part of one, of which every rank calls the same."""

    @property
    def shape(self) -> ModelShape: ...
    def make_room(self, tokens_BT: torch.Tensor) -> None: ...
    def loss(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor | float: ...
    def train(self) -> Any: ...
    def eval(self) -> Any: ...


@torch.no_grad()
def held_out_loss(
    model: Evaluated, corpus: Corpus, eval_tokens: int, device: torch.device, stretch: slice = slice(None)
) -> float:
    """Mean −log p in nats per token over `eval_tokens` tokens spread over the validation shard.

    The tokens are read in windows of seq_len, each predicted from its own window alone.

    Args:
        stretch: the part of the shard that is read.
    """
    total, count = 0.0, 0
    model.eval()
    seq_len = model.shape.seq_len
    batch_size = max(1, BATCH_TOKENS // seq_len)
    for inputs_BT, targets_BT in validation_windows(corpus.validation[stretch], seq_len, eval_tokens, batch_size):
        model.make_room(inputs_BT)
        total += float(model.loss(inputs_BT.to(device), targets_BT.to(device)))
        count += targets_BT.numel()
    model.train()
    return total / count


def source_losses(model: Evaluated, corpus: Corpus, eval_tokens: int, device: torch.device) -> dict[str, float]:
    """`held_out_loss` of each source of a mixture, on an equal share of eval_tokens each; empty without a mixture."""
    losses = {}
    end = 0
    for source in corpus.manifest.sources:
        start, end = end, end + source.validation_tokens
        if source.validation_tokens > model.shape.seq_len:
            share = eval_tokens // len(corpus.manifest.sources)
            losses[source.name] = held_out_loss(model, corpus, share, device, slice(start, end))
    return losses


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Nats per token to bits per byte: loss / (ln 2 · bytes per token)."""
    return loss / (math.log(2) * bytes_per_token)


def held_out_bytes_per_token(corpus: Corpus, seq_len: int, eval_tokens: int) -> float:
    """Bytes of text behind the tokens that `held_out_loss` predicts, a token."""
    total, count = 0, 0
    for _, targets_BT in validation_windows(corpus.validation, seq_len, eval_tokens, max(1, BATCH_TOKENS // seq_len)):
        total += int(corpus.token_bytes[targets_BT.numpy()].sum())
        count += targets_BT.numel()
    return total / count
