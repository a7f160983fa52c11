"""A small prepared corpus of real text, and runs on it that take about a second."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling.records import DataManifest
from scaling.shape import ShapeFamily
from scaling.spec import DataSpec, EvalSpec, OptimSpec, RunSpec, ScheduleSpec
from train.data.shards import prepare

VOCABULARY = 300
FAMILY = ShapeFamily(vocab_size=VOCABULARY, seq_len=32, depth=2, n_heads=2)


@pytest.fixture(scope="session")
def text_glob() -> str:
    """Some of the standard library's own sources."""
    return str(Path(sysconfig.get_paths()["stdlib"]) / "[a-d]*.py")


@pytest.fixture(scope="session")
def corpus_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this test session alone."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def manifest(text_glob: str, corpus_cache: Path) -> DataManifest:
    """The prepared corpus."""
    return prepare("text", text_glob, VOCABULARY, corpus_cache, progress=False)


@pytest.fixture
def make_spec(
    manifest: DataManifest, text_glob: str, corpus_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunSpec]:
    """RunSpecs on that corpus; the cache is set for this process and its children."""
    monkeypatch.setenv("ISOFLOP_CACHE", str(corpus_cache))

    def make(
        width: int = 16,
        steps: int = 60,
        peak_lr: float = 0.02,
        optim: str = "muon",
        kind: str = "wsd",
        **fields: object,
    ) -> RunSpec:
        optim_fields = {k: fields.pop(k) for k in list(fields) if k in OptimSpec.__dataclass_fields__}
        return RunSpec(
            **{
                "shape": FAMILY.shape(width),
                "data": DataSpec("text", path=text_glob, digest=manifest.digest),
                "tokens": steps * 256,
                "batch_tokens": 256,
                "optim": OptimSpec(optim, peak_lr, **optim_fields),  # type: ignore[arg-type]
                "schedule": ScheduleSpec(kind, warmup_tokens=5 * 256),  # type: ignore[arg-type]
                "eval": EvalSpec(4096, points=3),
                **fields,
            }  # type: ignore[arg-type]
        )

    return make
