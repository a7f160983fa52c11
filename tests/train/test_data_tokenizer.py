"""The tokenizer: control tokens, losslessness, and the fast path's equality with `tokenizers`."""

import numpy as np
import pytest

from scaling.errors import InputError
from train.data.tokenizer import CONTROL_TOKENS, EOS, MIN_VOCAB, encode, token_bytes, train_tokenizer

SAMPLE = [
    b"def f(x):\n    return x + 1  # doesn't change 2048 things\n" * 5,
    "Ça coûte 12 €, n'est-ce pas ?".encode() * 5,
]
HARD = [
    b"",
    b"   \n\t x\r\n\x0b\x0c\x1c\x00\x7f  ",
    b"if a==1:\n\n\n        b['k'] -= 3.14e-10;'tis\t\t# <|eos|> <|user|>",
    b"x" * 5000 + b" " * 300,
    "naïve — 数学 ١٢٣ ½ \u00a0 \u2003 \u0085 e\u0301 🙂".encode(),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SAMPLE, 300)


def test_control_tokens_come_first_and_are_distinct(tokenizer):
    assert [tokenizer.token_to_id(t) for t in CONTROL_TOKENS] == list(range(len(CONTROL_TOKENS)))
    assert tokenizer.get_vocab_size() == 300


def test_text_survives_and_never_spells_a_control_token(tokenizer):
    for document, tokens in zip(HARD, encode(tokenizer, HARD, "<u2"), strict=True):
        assert tokens.dtype == np.dtype("<u2")
        assert tokens[-1] == EOS
        assert not np.isin(tokens[:-1], range(len(CONTROL_TOKENS))).any()
        assert tokenizer.decode(tokens[:-1].tolist(), skip_special_tokens=False).encode() == document


def test_looked_up_pieces_give_the_tokens_of_the_library(tokenizer):
    every_ascii_pair = bytes(c for a in range(128) for b in range(128) for c in (a, b))
    documents = [*HARD, *SAMPLE, every_ascii_pair]
    tokenizer.encode_special_tokens = True
    for document, tokens in zip(documents, encode(tokenizer, documents, "<u4"), strict=True):
        assert tokens[:-1].tolist() == tokenizer.encode(document.decode(), add_special_tokens=False).ids


def test_training_is_deterministic():
    assert train_tokenizer(SAMPLE, 290).to_str() == train_tokenizer(SAMPLE, 290).to_str()


def test_token_bytes_sum_to_the_text(tokenizer):
    sizes = token_bytes(tokenizer)
    assert sizes[EOS] == 0
    for document, tokens in zip(HARD, encode(tokenizer, HARD, "<u2"), strict=True):
        assert sizes[tokens].sum() == len(document)


def test_digits_are_tokens_of_their_own(tokenizer):
    assert tokenizer.encode("2048").tokens == list("2048")


def test_too_small_and_too_large_vocabularies_are_refused():
    with pytest.raises(InputError, match=f"vocab_size 100 .*at least {MIN_VOCAB}"):
        train_tokenizer(SAMPLE, 100)
    assert train_tokenizer(SAMPLE, MIN_VOCAB).get_vocab_size() == MIN_VOCAB
    with pytest.raises(InputError, match="too small for a vocabulary of 5000"):
        train_tokenizer(SAMPLE, 5000)
