"""How fast the data path is: tokenising against the `tokenizers` library, and the loader's share of a step.

python bench/data.py [--digest DIGEST] [--step-ms 50] [--batch-tokens 2048]   (prepares data=stdlib when no digest is given)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

from scaling.errors import run_command
from train.data.loader import Corpus, Loader
from train.data.shards import prepare
from train.data.tokenizer import encode

SAMPLE_BYTES = 20_000_000


def timed_s(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def tokenising(corpus: Corpus, repeats: int) -> dict[str, float]:
    """MB/s of `encode` and of `tokenizers.encode_batch_fast` on the same documents, interleaved, medians."""
    tokenizer = corpus.tokenizer
    documents: list[bytes] = []
    start = size = 0
    for end in corpus.train_ends.tolist():
        documents.append(tokenizer.decode(corpus.train[start : end - 1].tolist()).encode())
        start, size = end, size + len(documents[-1])
        if size > SAMPLE_BYTES:
            break
    texts = [d.decode() for d in documents]
    ours, library = [], []
    for _ in range(repeats):
        ours.append(size / 1e6 / timed_s(lambda: list(encode(tokenizer, documents, corpus.train.dtype))))
        library.append(size / 1e6 / timed_s(lambda: tokenizer.encode_batch_fast(texts, add_special_tokens=False)))
    return {
        "sample_mb": size / 1e6,
        "encode_mb_per_s": statistics.median(ours),
        "tokenizers_mb_per_s": statistics.median(library),
        "ratio": statistics.median(a / b for a, b in zip(ours, library, strict=True)),
    }


def loading(corpus: Corpus, seq_len: int, batch_tokens: int, step_ms: float) -> dict[str, float]:
    """Milliseconds of one batch without prefetch, its share of a step, and of the first one (the permutation)."""
    loader = Loader(corpus.train, seq_len, batch_tokens, seed=0)
    first_ms = 1e3 * timed_s(lambda: loader.batch(0))
    batch_ms = statistics.median(1e3 * timed_s(lambda s=s: loader.batch(s)) for s in range(1, 1001))  # type: ignore[misc]
    return {"first_batch_ms": first_ms, "batch_ms": batch_ms, "share_of_step": batch_ms / (batch_ms + step_ms)}


def main(argv: list[str]) -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--digest", help="a prepared corpus (default: data=stdlib, vocabulary 512)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--step-ms", type=float, default=50.0, help="a step's time without the loader")
    args = parser.parse_args(argv)
    corpus = Corpus.open(args.digest or prepare("stdlib", None, 512).digest)
    print(
        json.dumps(
            {
                "corpus": corpus.manifest.digest,
                "tokenising": tokenising(corpus, args.repeats),
                "loader": loading(corpus, args.seq_len, args.batch_tokens, args.step_ms),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    run_command(main)
