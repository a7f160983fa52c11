"""Prepared corpora on disk: token shards, memory-mapped, in a folder named by what is in them.

CACHE/data/DIGEST/tokenizer.json
                  train.bin validation.bin      tokens, little-endian uint16 (uint32 above 65,536 entries)
                  train.ends validation.ends    little-endian uint64: where each document ends, <|eos|> included
                  manifest.json                 a DataManifest
CACHE/data/index/KEY.json    KEY = hash of the source files' paths, sizes and times → DIGEST, so that a second call
                             reads no text; KEY.lock, held while the corpus is made
CACHE/data/.building-KEY/    renamed to DIGEST when complete; after a crash the next call goes on from its parts/
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

from scaling.config import canonical_json, to_dict
from scaling.errors import InputError
from scaling.files import read_json, write_json, write_text
from scaling.records import DataManifest, SourceManifest
from scaling.sweepdir import check_writable, default_cache
from train.data.corpus import Source, find_sources, split
from train.data.dedup import without_duplicates
from train.data.parts import Part, Scan, documents, each, parts_of, scan, tokenise
from train.data.tokenizer import TRAINING_BYTES, check_vocab_size, token_bytes, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1
"""Raised when the same files would give other shards: cleaning, deduplication, split or tokenizer changed."""
DIGEST_FILES = ("tokenizer.json", "train.bin", "validation.bin")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How tokens are stored."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def check_vocabulary(vocab_size: int, manifest: DataManifest) -> None:
    """Refuse a model whose vocabulary is not that of the shards' tokenizer: ids would have no row, or rows no id.

    Raises:
        InputError: with both sizes.
    """
    if vocab_size != manifest.vocab_size:
        dtype = token_dtype(manifest.vocab_size)
        raise InputError(
            f"model.vocab_size = {vocab_size}: corpus {manifest.digest} has a tokenizer of {manifest.vocab_size} entries, its "
            f"tokens in {dtype.itemsize} bytes: prepare the text with --vocab-size {vocab_size}, or give model.vocab_size="
            f"{manifest.vocab_size}"
        )


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

    Reading and encoding take a process a core. Killed, the next call goes on from the parts that were done.

    Args:
        name: stdlib | site | english | headers | text | jsonl | parquet | mixture.
        path: glob of the files, where the name does not say them; of a mixture "NAME=FILES; NAME=FILES".
        vocab_size: tokenizer entries, control tokens included.
        cache: where corpora are kept; `default_cache()` when None.
        progress: bars on stderr.
    Raises:
        InputError: what `find_sources`, `split`, `train_tokenizer` refuse; a cache that cannot be written.
    """
    check_vocab_size(vocab_size)
    data = _data_folder(cache)
    sources = find_sources(name, path)
    key = _source_key(name, sources, vocab_size)
    found = _lookup(data, key)
    if found:
        return found
    check_writable(data / "index")
    with _lock(data / "index" / f"{key}.lock"):
        found = _lookup(data, key)  # another process made it while this one waited
        if found:
            return found
        building = data / f".building-{key}"
        building.mkdir(exist_ok=True)
        try:
            manifest = _build(name, sources, vocab_size, building, _bars(progress))
        except Exception:
            shutil.rmtree(building, ignore_errors=True)
            raise
        shutil.rmtree(building / "parts")
        with contextlib.suppress(OSError):  # there already: other files, the same tokens
            building.rename(data / manifest.digest)
        shutil.rmtree(building, ignore_errors=True)
        write_json(data / "index" / f"{key}.json", {"digest": manifest.digest})
    return DataManifest.read(data / manifest.digest / "manifest.json")


Bar = Callable[[str, str], Callable[[Iterable[Any]], Iterable[Any]]]
Place = tuple[int, int]
"""Part, and document in it."""


def _build(name: str, sources: Sequence[Source], vocab_size: int, folder: Path, bar: Bar) -> DataManifest:
    """Write all files of a corpus into `folder`, the manifest last."""
    spool = folder / "parts"
    spool.mkdir(exist_ok=True)
    parts = parts_of(sources)
    each(scan, [(part,) for part in parts], spool, "scan.npz", bar("reading", "parts"))
    scans = [Scan.load(part, spool) for part in parts]
    places = [(part.number, i) for part in parts for i in range(len(scans[part.number].keys))]
    keys = [key for held in scans for key in held.keys]
    sizes = np.concatenate([held.sizes for held in scans]) if scans else np.empty(0, np.int64)
    sketches = np.concatenate([held.sketches for held in scans]) if scans else np.empty((0, 0), np.uint64)
    kept = without_duplicates(keys, sizes, sketches, bar("deduplicating", "documents"))
    total = int(sizes[kept].sum())
    sides: dict[str, list[list[int]]] = {"train": [], "validation": []}
    for number in range(len(sources)):
        mine = [i for i in kept if parts[places[i][0]].source == number]
        for side, chosen in zip(sides, split([keys[i] for i in mine], total), strict=True):
            sides[side].append([mine[j] for j in chosen])

    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.exists():
        sample = sorted((i for stretch in sides["train"] for i in stretch), key=keys.__getitem__)
        texts = _sample([places[i] for i in sample], parts, scans, spool)
        write_text(tokenizer_file, train_tokenizer(texts, vocab_size).to_str(pretty=True))
    dtype = token_dtype(vocab_size)
    stays: list[list[int]] = [[] for _ in parts]
    for i in sorted(kept):
        stays[places[i][0]].append(places[i][1])
    tokenizer_json = tokenizer_file.read_text(encoding="utf-8")
    each(
        tokenise,
        [(part, tokenizer_json, dtype, stays[part.number]) for part in parts],
        spool,
        "ends.npy",
        bar("encoding", "parts"),
    )
    encoded = _Encoded(parts, stays, spool, dtype)
    counts = {side: _write_shard(folder, side, stretches, places, encoded) for side, stretches in sides.items()}
    lengths = {side: [len(stretch) for stretch in stretches] for side, stretches in sides.items()}
    text_bytes = {side: int(sizes[[i for s in stretches for i in s]].sum()) for side, stretches in sides.items()}
    of_sources = tuple(
        SourceManifest(
            source.label, counts["train"][n], counts["validation"][n], lengths["train"][n], lengths["validation"][n]
        )
        for n, source in enumerate(sources)
        if source.label is not None
    )
    manifest = DataManifest(
        name=name,
        digest=digest_of(folder, of_sources),
        vocab_size=vocab_size,
        train_tokens=sum(counts["train"]),
        validation_tokens=sum(counts["validation"]),
        train_bytes=text_bytes["train"],
        validation_bytes=text_bytes["validation"],
        train_documents=sum(lengths["train"]),
        validation_documents=sum(lengths["validation"]),
        duplicates_removed=len(keys) - len(kept),
        replaced_bytes=sum(held.replaced for held in scans),
        sources=of_sources,
    )
    manifest.write(folder / "manifest.json")
    return manifest


def _sample(places: Sequence[Place], parts: Sequence[Part], scans: Sequence[Scan], spool: Path) -> list[bytes]:
    """The first documents, until the tokenizer has enough to learn from."""
    out: list[bytes] = []
    size = 0
    for number, i in places:
        out += documents(parts[number], spool, scans[number].sizes, [i])
        size += len(out[-1])
        if size >= TRAINING_BYTES:
            break
    return out


class _Encoded:
    """The tokens of the parts, by document."""

    def __init__(
        self, parts: Sequence[Part], stays: Sequence[Sequence[int]], spool: Path, dtype: np.dtype[Any]
    ) -> None:
        self.ends = [np.load(part.path(spool, "ends.npy")) for part in parts]
        self.rows = [dict(zip(stays[part.number], range(len(stays[part.number])), strict=True)) for part in parts]
        self.tokens = [
            np.memmap(part.path(spool, "tokens"), dtype, "r") if ends[-1] else np.empty(0, dtype)
            for part, ends in zip(parts, self.ends, strict=True)
        ]

    def __getitem__(self, place: Place) -> NDArray[np.unsignedinteger]:
        number, i = place
        row = self.rows[number][i]
        return self.tokens[number][self.ends[number][row] : self.ends[number][row + 1]]


def _write_shard(
    folder: Path, side: str, stretches: Sequence[Sequence[int]], places: Sequence[Place], encoded: _Encoded
) -> list[int]:
    """Write SIDE.bin and SIDE.ends, a stretch of documents after the other; returns the number of tokens of each."""
    ends: list[int] = []
    counts = []
    total = 0
    with open(folder / f"{side}.bin", "wb") as file:
        for stretch in stretches:
            before = total
            for i in stretch:
                tokens = encoded[places[i]]
                tokens.tofile(file)
                total += len(tokens)
                ends.append(total)
            counts.append(total - before)
        file.flush()
        os.fsync(file.fileno())
    np.array(ends, "<u8").tofile(folder / f"{side}.ends")
    return counts


def digest_of(folder: Path, sources: Sequence[SourceManifest]) -> str:
    """Of tokenizer and tokens, and of which are whose where there are several sources."""
    digest = hashlib.sha256(canonical_json(to_dict(sources)).encode() if sources else b"")
    for name in DIGEST_FILES:
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def corpora_named(name: str, cache: Path | None = None) -> list[DataManifest]:
    """The corpora of a name that are prepared on this machine."""
    manifests = map(DataManifest.read, sorted(_data_folder(cache).glob("*/manifest.json")))
    return [manifest for manifest in manifests if manifest.name == name]


def _data_folder(cache: Path | None) -> Path:
    return (cache or default_cache()) / "data"


def _source_key(name: str, sources: Sequence[Source], vocab_size: int) -> str:
    """Hash of all that decides the shards, the files' contents through their sizes and times."""
    stats: list[Any] = []
    for source in sources:
        stats += [] if source.label is None else [source.label]
        for file in source.files:
            with contextlib.suppress(OSError):  # a broken link among the installed files
                stat = file.stat()
                stats.append([str(file), stat.st_size, stat.st_mtime_ns])
    what = {"name": name, "vocab_size": vocab_size, "format": FORMAT, "files": stats}
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
