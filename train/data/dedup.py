"""Exact and near duplicates out, before the split: a copy in both halves would be a leak.

Two documents are near duplicates when the Jaccard similarity of their sets of five-word shingles, estimated from
128 hashes, is at least 0.7 (Broder 1997, "On the resemblance and containment of documents"). Words are what white
space separates.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from train.data.corpus import content_key

SHINGLE_WORDS = 5
HASHES = 128
BANDS = 32
"""Candidates agree on all four hashes of one band: at similarity 0.7 one in ten thousand pairs is missed."""
THRESHOLD = 0.7

Progress = Callable[[Iterable[bytes]], Iterable[bytes]]


def sketch(document: bytes) -> NDArray[np.uint64]:
    """MinHash sketch (HASHES,): the shingle hash that follows each of HASHES points spread evenly over a ring.

    One sort gives all of them, and two sketches agree at a point with probability exactly equal to the Jaccard
    similarity, empty bins included (one-permutation hashing with rotation, Shrivastava & Li 2014, arXiv 1406.4784).
    """
    words = document.split()
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    shingles = np.zeros(max(1, len(words) - SHINGLE_WORDS + 1), np.uint64)
    for i in range(min(SHINGLE_WORDS, len(words))):
        shingles = _mix(shingles ^ hashes[i : i + len(shingles)])
    shingles.sort()
    points = np.arange(HASHES, dtype=np.uint64) << np.uint64(64 - HASHES.bit_length() + 1)
    return shingles[np.searchsorted(shingles, points) % len(shingles)]


def deduplicate(documents: Sequence[bytes], progress: Progress = iter) -> tuple[list[bytes], int]:
    """The documents without copies: of near duplicates the longest stays, of equal length the lowest content key.

    A document goes when it resembles one that stays, so a chain of small changes keeps its ends.

    Args:
        documents: in any order; the result does not depend on it.
        progress: wraps the iteration over the documents.
    Returns:
        What stays, the longest first, and how many were removed.
    """
    unique = sorted(set(documents), key=lambda d: (-len(d), content_key(d)))
    kept: list[bytes] = []
    sketches: list[NDArray[np.uint64]] = []
    seen: dict[bytes, list[int]] = defaultdict(list)
    for document in progress(unique):
        mine = sketch(document)
        bands = mine.tobytes()
        width = len(bands) // BANDS
        keys = [bytes([b]) + bands[b * width : (b + 1) * width] for b in range(BANDS)]
        candidates = {i for key in keys for i in seen.get(key, ())}
        if any(np.count_nonzero(sketches[i] == mine) >= THRESHOLD * HASHES for i in candidates):
            continue
        for key in keys:
            seen[key].append(len(kept))
        kept.append(document)
        sketches.append(mine)
    return kept, len(documents) - len(kept)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit numbers in which every bit depends on all (the finaliser of SplitMix64)."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
