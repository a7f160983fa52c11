"""Prepared corpora on disk: token shards, memory-mapped, in a folder named by what is in them.

CACHE/data/DIGEST/tokenizer.json
                  train.bin validation.bin      tokens, little-endian uint16 (uint32 above 65,536 entries)
                  train.ends validation.ends    little-endian uint64: where each document ends, <|eos|> included
                  manifest.json                 a DataManifest
CACHE/data/index/KEY.json    KEY = hash of the source files' paths, sizes and times → DIGEST, so that a second call
                             reads no text; KEY.lock, held while the corpus is made
CACHE/data/.building-KEY/    renamed to DIGEST when complete; what a crash leaves is cleared by the next call
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scaling.config import canonical_json
from scaling.errors import InputError
from scaling.files import read_json, write_json
from scaling.records import DataManifest
from scaling.sweepdir import check_writable, default_cache
from train.data.corpus import Source, split
from train.data.dedup import deduplicate
from train.data.tokenizer import check_vocab_size, encode, token_bytes, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1
"""Raised when the same files would give other shards: cleaning, deduplication, split or tokenizer changed."""
DIGEST_FILES = ("tokenizer.json", "train.bin", "validation.bin")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How tokens are stored."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus, opened for reading."""

    folder: Path
    manifest: DataManifest
    train: NDArray[np.unsignedinteger]
    """Training tokens, (train_tokens,), memory-mapped."""
    validation: NDArray[np.unsignedinteger]
    """Held-out tokens, (validation_tokens,), memory-mapped."""
    train_ends: NDArray[np.uint64]
    """Position after each training document's <|eos|>, (train_documents,)."""
    validation_ends: NDArray[np.uint64]
    """The same for the held-out documents."""

    @classmethod
    def open(cls, digest: str, cache: Path | None = None) -> Corpus:
        """Map the shards of a corpus.

        Args:
            digest: its DataManifest.digest.
            cache: where corpora are kept; `default_cache()` when None.
        Raises:
            InputError: not prepared on this machine, or damaged.
        """
        folder = _data_folder(cache) / digest
        if not (folder / "manifest.json").exists():
            raise InputError(
                f"no prepared corpus {digest} in {folder.parent}: make it with "
                "python -m train.prepare --data NAME [--path GLOB] --vocab-size V"
            )
        manifest = DataManifest.read(folder / "manifest.json")
        dtype = token_dtype(manifest.vocab_size)
        sizes = {
            "train.bin": (dtype, manifest.train_tokens),
            "validation.bin": (dtype, manifest.validation_tokens),
            "train.ends": (np.dtype("<u8"), manifest.train_documents),
            "validation.ends": (np.dtype("<u8"), manifest.validation_documents),
        }
        return cls(folder, manifest, *(_map(folder / name, *size) for name, size in sizes.items()))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The corpus's tokenizer."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text behind each token, (vocab_size,): the sum over targets turns nats into bits per byte."""
        return token_bytes(self.tokenizer)


def prepare(
    name: str, path: str | None = None, vocab_size: int = 512, cache: Path | None = None, progress: bool = True
) -> DataManifest:
    """Make a corpus's shards, or find them made: read, clean, drop duplicates, split, learn BPE, encode.

    Args:
        name: stdlib | site | text | jsonl.
        path: glob of the files, for text and jsonl.
        vocab_size: tokenizer entries, control tokens included.
        cache: where corpora are kept; `default_cache()` when None.
        progress: bars on stderr.
    Raises:
        InputError: what `Source`, `split`, `train_tokenizer` refuse; a cache that cannot be written.
    """
    check_vocab_size(vocab_size)
    data = _data_folder(cache)
    source = Source.find(name, path)
    key = _source_key(source, vocab_size)
    found = _lookup(data, key)
    if found:
        return found
    check_writable(data / "index")
    with _lock(data / "index" / f"{key}.lock"):
        found = _lookup(data, key)  # another process made it while this one waited
        if found:
            return found
        building = data / f".building-{key}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        try:
            manifest = _build(source, vocab_size, building, _bars(progress))
            with contextlib.suppress(OSError):  # there already: other files, the same tokens
                building.rename(data / manifest.digest)
            write_json(data / "index" / f"{key}.json", {"digest": manifest.digest})
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return DataManifest.read(data / manifest.digest / "manifest.json")


Bar = Callable[[str, str], Callable[[Iterable[Any]], Iterable[Any]]]


def _build(source: Source, vocab_size: int, folder: Path, bar: Bar) -> DataManifest:
    """Write all files of a corpus into `folder`, the manifest last."""
    documents, replaced = source.read(bar("reading", "files"))
    kept, removed = deduplicate(documents, bar("deduplicating", "documents"))
    train, validation = split(kept)
    tokenizer = train_tokenizer(train, vocab_size)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    dtype = token_dtype(vocab_size)
    tokens = {
        side: _write_shard(folder, side, encode(tokenizer, texts, dtype, bar(f"encoding {side}", "documents")))
        for side, texts in (("train", train), ("validation", validation))
    }
    manifest = DataManifest(
        name=source.spec.name,
        digest=_digest(folder),
        vocab_size=vocab_size,
        train_tokens=tokens["train"],
        validation_tokens=tokens["validation"],
        train_bytes=sum(map(len, train)),
        validation_bytes=sum(map(len, validation)),
        train_documents=len(train),
        validation_documents=len(validation),
        duplicates_removed=removed,
        replaced_bytes=replaced,
    )
    manifest.write(folder / "manifest.json")
    return manifest


def _write_shard(folder: Path, side: str, documents: Iterable[NDArray[np.unsignedinteger]]) -> int:
    """Write SIDE.bin and SIDE.ends; returns the number of tokens."""
    ends: list[int] = []
    total = 0
    with open(folder / f"{side}.bin", "wb") as file:
        for tokens in documents:
            tokens.tofile(file)
            total += len(tokens)
            ends.append(total)
        file.flush()
        os.fsync(file.fileno())
    np.array(ends, "<u8").tofile(folder / f"{side}.ends")
    return total


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in DIGEST_FILES:
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _data_folder(cache: Path | None) -> Path:
    return (cache or default_cache()) / "data"


def _source_key(source: Source, vocab_size: int) -> str:
    """Hash of all that decides the shards, the files' contents through their sizes and times."""
    stats = []
    for file in source.files:
        with contextlib.suppress(OSError):  # a broken link among the installed files
            stat = file.stat()
            stats.append([str(file), stat.st_size, stat.st_mtime_ns])
    what = {"name": source.spec.name, "vocab_size": vocab_size, "format": FORMAT, "files": stats}
    return hashlib.sha256(canonical_json(what).encode()).hexdigest()[:16]


def _lookup(data: Path, key: str) -> DataManifest | None:
    index = data / "index" / f"{key}.json"
    if not index.exists():
        return None
    manifest = data / read_json(index, "corpus index")["digest"] / "manifest.json"
    return DataManifest.read(manifest) if manifest.exists() else None


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, waiting for it; the kernel frees it when the holder dies."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process is preparing this corpus: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _map(path: Path, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """A read-only array over a file that must hold exactly `size` items."""
    try:
        found = path.stat().st_size
        if found != size * dtype.itemsize:
            raise InputError(
                f"{path} has {found} bytes instead of {size * dtype.itemsize}: delete {path.parent} and prepare again"
            )
        return np.asarray(np.memmap(path, dtype, "r"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _bars(progress: bool) -> Bar:
    def bar(what: str, unit: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        if not progress:
            return iter

        def wrap(items: Iterable[Any]) -> Iterable[Any]:
            from tqdm import tqdm

            total = len(items) if isinstance(items, Sequence) else None
            return tqdm(items, what, total, unit=f" {unit}", file=sys.stderr, mininterval=0.5)

        return wrap

    return bar
