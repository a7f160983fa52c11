"""Next tokens: temperature, top-k and top-p sampling over the decoder and its cache of keys and values."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaling.errors import InputError
from train.model.cache import KVCache
from train.model.decoder import Decoder


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from softmax(logits / temperature), cut to its top k, then to its top p."""

    temperature: float = 0.8
    """0: the most likely token, always."""
    top_k: int | None = 50
    """The k most likely tokens alone; None: all."""
    top_p: float = 1.0
    """The fewest most likely tokens that together have this share (Holtzman et al. 2020, arXiv 1904.09751)."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature {self.temperature}: must be 0 (the most likely token) or positive")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top-k {self.top_k}: must be at least 1")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p {self.top_p}: must be above 0 and at most 1")

    def candidates(self, logits_V: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that can come next, the most likely first, and their probabilities before they sum to 1."""
        if self.temperature == 0:
            return logits_V.argmax()[None], torch.ones(1)
        logits, ids = logits_V.double().sort(descending=True, stable=True)
        p = ((logits - logits[0]) / self.temperature).softmax(0)[: self.top_k]
        before = p.cumsum(0) - p
        count = max(1, int((before < self.top_p * p.sum()).sum()))
        return ids[:count], p[:count]


def window_tokens(seq_len: int) -> int:
    """Tokens that are kept when seq_len of them have been read: the last three quarters."""
    return max(1, seq_len * 3 // 4)


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    n_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Tokens that follow the prompt; equal arguments give equal tokens.

    The model has no positions beyond the sequence length that it was trained on. When that many tokens have been read,
    the last three quarters of them are read again from position 0, and the older ones are forgotten. Of a longer
    prompt the last seq_len tokens are read.

    Args:
        prompt: ids, at least one.
        n_tokens: how many to draw at most.
        seed: of the draws.
        stop: ids that end the text; the one that did is yielded.
    """
    generator = torch.Generator().manual_seed(seed)
    seq_len, device = model.shape.seq_len, model.lm_head.weight.device
    cache = KVCache(model.shape, min(seq_len, len(prompt) + n_tokens), model.dtype, device)
    context = list(prompt[-seq_len:])
    unread = context
    for _ in range(n_tokens):
        if cache.length + len(unread) > seq_len:
            context = unread = context[-window_tokens(seq_len) :]
            cache.clear()
        hidden_1TD = model.hidden(torch.tensor([unread], device=device), cache)
        ids, p = sampling.candidates(model.lm_head(hidden_1TD[0, -1]).float().cpu())
        token = int(ids[torch.multinomial(p, 1, generator=generator)])
        yield token
        if token in stop:
            return
        context.append(token)
        unread = [token]
