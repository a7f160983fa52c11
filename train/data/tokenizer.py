"""Byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2), with control tokens that text cannot spell.

Text is cut into pieces first, and no merge crosses a piece: one digit; a run of letters or of other signs, each with
the space before it; white space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import DTypeLike, NDArray

from scaling.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
"""Ids 0 to 5. Every document of a shard ends with <|eos|>; the others are kept for later training."""
EOS = CONTROL_TOKENS.index("<|eos|>")
PIECE = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ASCII_PIECE = re.compile(rb"[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
"""PIECE in a text that is all ASCII."""
MIN_VOCAB = 256 + len(CONTROL_TOKENS)
TRAINING_BYTES = 20_000_000
"""BPE learns from the first documents that come to this: their order is a shuffle already."""
BATCH_BYTES = 4_000_000
MEMO_PIECES = 1_000_000


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that cannot hold the 256 bytes and the control tokens."""
    if vocab_size < MIN_VOCAB:
        raise InputError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(CONTROL_TOKENS)} control tokens need "
            f"at least {MIN_VOCAB}"
        )


def train_tokenizer(documents: Sequence[bytes], vocab_size: int) -> Tokenizer:
    """Learn BPE merges; equal documents in equal order give equal merges.

    Args:
        documents: the training documents, shuffled; the first TRAINING_BYTES are read.
        vocab_size: entries, control tokens included.
    Raises:
        InputError: vocabulary too small, or larger than the text has pairs to merge.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECE), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    sizes = accumulate(map(len, documents), initial=0)
    sample = (d.decode() for d, _ in takewhile(lambda p: p[1] < TRAINING_BYTES, zip(documents, sizes, strict=False)))
    tokenizer.train_from_iterator(sample, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise InputError(
            f"the corpus is too small for a vocabulary of {vocab_size}: it has "
            f"{tokenizer.get_vocab_size()} different pieces at most; use a vocab_size up to that or more text"
        )
    return tokenizer


def encode(
    tokenizer: Tokenizer,
    documents: Iterable[bytes],
    dtype: DTypeLike,
    progress: Callable[[Iterable[bytes]], Iterable[bytes]] = iter,
) -> Iterator[NDArray[np.unsignedinteger]]:
    """Tokens of each document, <|eos|> at its end. Text that spells a control token stays text.

    The pieces of ASCII documents, most of which come again and again, are looked up; other documents go through
    `tokenizers` on all cores. Both give the same tokens.

    Args:
        dtype: of the yielded arrays, shape (tokens of the document,).
        progress: wraps the iteration over the documents.
    """
    tokenizer.encode_special_tokens = True
    memo = _PieceMemo(tokenizer, dtype)
    for batch in _batches(progress(documents)):
        others = [d.decode() for d in batch if not d.isascii()]
        encodings = iter(tokenizer.encode_batch_fast(others, add_special_tokens=False))
        for document in batch:
            if document.isascii():
                pieces = ASCII_PIECE.findall(document)
                tokens = np.frombuffer(b"".join(map(memo.__getitem__, pieces)), dtype)
            else:
                tokens = np.array(next(encodings).ids, dtype)
            yield np.append(tokens, np.array(EOS, dtype))


class _PieceMemo(dict[bytes, bytes]):
    """The stored tokens of each piece of text met so far; started anew at MEMO_PIECES of them."""

    def __init__(self, tokenizer: Tokenizer, dtype: DTypeLike) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype

    def __missing__(self, piece: bytes) -> bytes:
        if len(self) >= MEMO_PIECES:
            self.clear()
        ids = self.tokenizer.encode(piece.decode(), add_special_tokens=False).ids
        tokens = self[piece] = np.array(ids, self.dtype).tobytes()
        return tokens


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of text that each token stands for, (vocab_size,); 0 for control tokens."""
    sizes = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for token, i in tokenizer.get_vocab().items():
        sizes[i] = 0 if token in CONTROL_TOKENS else len(token)  # byte-level BPE writes each byte as one character
    return sizes


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Documents in groups of about BATCH_BYTES, so that the cores share the work and memory stays bounded."""
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    yield batch
