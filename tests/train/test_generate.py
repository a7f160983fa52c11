"""Generation: the cache changes nothing, the window is what it says, and the draws follow the settings and the seed."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from scaling.errors import InputError
from scaling.records import DataManifest
from scaling.shape import ModelShape
from scaling.spec import RunSpec
from scaling.sweepdir import RunDir
from train import generate as entry
from train.data.shards import Corpus
from train.data.tokenizer import EOS
from train.engine import Host, train
from train.engine.signals import Interrupted
from train.export import export
from train.model.cache import KVCache
from train.model.decoder import Decoder
from train.model.sampling import Sampling, generate, window_tokens
from train.trained import load_run

ROOT = Path(__file__).resolve().parents[2]
BASE = ModelShape(width=32, depth=3, n_heads=4, d_ff=88, vocab_size=96, seq_len=16)
GREEDY = Sampling(temperature=0)


def random_model(shape: ModelShape = BASE, precision: str = "fp32") -> Decoder:
    model = Decoder(shape, precision)
    model.initialise(1)
    return model


def random_tokens(*size: int) -> torch.Tensor:
    return torch.randint(0, BASE.vocab_size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_run(make_spec: Callable[..., RunSpec], tmp_path: Path) -> Callable[[], Path]:
    """A run of 60 steps."""

    def make() -> Path:
        spec = make_spec()
        train(spec, RunDir(tmp_path / spec.run_id))
        return tmp_path / spec.run_id

    return make


def generated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    """What the command prints with --json -."""
    entry.main([*arguments, "--json", "-"])
    result: dict[str, object] = json.loads(capsys.readouterr().out)
    return result


# --- the cache


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"n_kv_heads": 2},
        {"n_kv_heads": 1, "head_dim": 6, "tied_embeddings": True},
        {"qk_norm": False},
        {"width": 64, "n_heads": 2, "seq_len": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", [1, 5])
@torch.no_grad()
def test_cached_logits_are_the_uncached(change: dict[str, int], prompt: int) -> None:
    model = random_model(dataclasses.replace(BASE, **change))
    tokens_BT = random_tokens(2, model.shape.seq_len)
    cache = KVCache(model.shape, model.shape.seq_len, model.dtype, torch.device("cpu"), batch_size=2)
    pieces = [tokens_BT[:, :prompt], *tokens_BT[:, prompt:].split(1, dim=1)]
    for _ in range(2):
        cached = torch.cat([model.lm_head(model.hidden(piece, cache)) for piece in pieces], dim=1)
        torch.testing.assert_close(cached, model(tokens_BT), rtol=0, atol=1e-5)
        assert cache.length == model.shape.seq_len
        cache.clear()


@torch.no_grad()
def test_cached_logits_in_bf16() -> None:
    model = random_model(precision="bf16")
    tokens = random_tokens(1, 16)
    cache = KVCache(BASE, 16, model.dtype, torch.device("cpu"))
    cached = torch.cat([model.lm_head(model.hidden(t, cache)) for t in tokens.split(1, dim=1)], dim=1)
    assert cached.dtype == torch.bfloat16
    torch.testing.assert_close(cached, model(tokens), rtol=0.02, atol=0.05)


# --- the window


@pytest.mark.parametrize("seq_len", [1, 2, 7, 16])
@pytest.mark.parametrize("prompt", [1, 10, 40])
@torch.no_grad()
def test_beyond_the_trained_length_the_older_text_is_forgotten(seq_len: int, prompt: int) -> None:
    model = random_model(dataclasses.replace(BASE, seq_len=seq_len))
    context = random_tokens(prompt).tolist()[-seq_len:]
    ids = list(generate(model, random_tokens(prompt).tolist(), 60, GREEDY))
    for token in ids:  # the same without a cache
        assert len(context) <= seq_len
        assert int(model(torch.tensor([context]))[0, -1].argmax()) == token
        context.append(token)
        if len(context) > seq_len:
            context = context[-window_tokens(seq_len) :]
    assert len(ids) == 60
    assert len(set(ids)) > 1


def test_generation_stops_after_the_end_of_the_text() -> None:
    model = random_model()
    ids = list(generate(model, [1, 2, 3], 20, GREEDY))
    end = ids[7]
    assert list(generate(model, [1, 2, 3], 20, GREEDY, stop={end})) == ids[: ids.index(end) + 1]


# --- the draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0, None), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(1.0, 2), [0.5, 0.3]),
        (Sampling(1.0, 100), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(1.0, None, 0.79), [0.5, 0.3]),
        (Sampling(1.0, None, 0.81), [0.5, 0.3, 0.15]),
        (Sampling(1.0, 3, 0.81), [0.5, 0.3]),  # of the three that top_k leaves, two have 84%
        (Sampling(1.0, None, 1e-9), [0.5]),
        (Sampling(0.0, None), [1.0]),
        (Sampling(0.5, None), [p**2 / 0.365 for p in (0.5, 0.3, 0.15, 0.05)]),
        (Sampling(1e-300, None), [1.0]),
    ],
)
def test_candidates(sampling: Sampling, expected: list[float]) -> None:
    ids, p = sampling.candidates(torch.tensor([0.15, 0.5, 0.05, 0.3]).log() + 7)
    assert ids.tolist() == [1, 3, 0, 2][: len(expected)]
    assert p.tolist() == pytest.approx(expected, abs=1e-6)


def test_draws_have_the_models_probabilities() -> None:
    model = random_model(dataclasses.replace(BASE, vocab_size=8))
    with torch.no_grad():
        p = (model(torch.tensor([[3]]))[0, -1] / 0.7).softmax(0)
    draws = Counter(next(generate(model, [3], 1, Sampling(0.7, None), seed)) for seed in range(400))
    for token in range(8):
        sigma = math.sqrt(400 * p[token] * (1 - p[token]))
        assert abs(draws[token] - 400 * p[token]) < 4 * sigma + 1


def test_the_seed_decides_the_text() -> None:
    model = random_model()
    texts = [tuple(generate(model, [1], 30, Sampling(), seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1.0, 50, 1.0), "temperature -1.0: must be 0"),
        ((math.nan, 50, 1.0), "temperature nan"),
        ((math.inf, 50, 1.0), "temperature inf"),
        ((1.0, 0, 1.0), "top-k 0: must be at least 1"),
        ((1.0, 50, 0.0), "top-p 0.0: must be above 0"),
        ((1.0, 50, 1.5), "top-p 1.5"),
    ],
)
def test_settings_that_cannot_be(values: tuple[float, int, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(*values)


# --- text


def test_streamed_text_is_the_decoded_text(manifest: DataManifest, corpus_cache: Path) -> None:
    tokenizer = Corpus.open(manifest.digest, corpus_cache).tokenizer
    generator = torch.Generator().manual_seed(0)
    texts = [tokenizer.encode("naïve €5 😀 日本").ids]
    texts += [torch.randint(0, 300, (40,), generator=generator).tolist() for _ in range(50)]  # most are not UTF-8
    for ids in texts:
        seen: list[int] = []
        pieces = list(entry.stream(tokenizer, iter(ids), seen))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert seen == ids
    first = list(islice(entry.stream(tokenizer, iter(texts[0]), []), 3))
    assert "".join(first) == "naï"  # text comes while the tokens do


# --- the command


def test_command_goes_on_from_the_prompt(make_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_run())
    result = generated(capsys, run, "--prompt", "def ", "--tokens", "50")
    assert generated(capsys, run, "--prompt", "def ", "--tokens", "50")["text"] == result["text"]
    assert generated(capsys, run, "--prompt", "def ", "--tokens", "50", "--seed", "1")["text"] != result["text"]
    assert len(result["tokens"]) == 50 or result["stopped"] == "eos"  # type: ignore[arg-type]
    assert result["model"] == f"{Path(run).name} step 60"
    tokenizer = load_run(Path(run)).tokenizer()
    assert tokenizer.decode(result["tokens"]) == result["text"]  # type: ignore[arg-type]
    entry.main([run, "--prompt", "def ", "--tokens", "50"])
    captured = capsys.readouterr()
    assert captured.out == f"def {result['text']}\n"
    assert "was trained on 32 tokens at a time: it sees the last 24 to 32 tokens" in captured.err
    entry.main([run, "--prompt", "def ", "--tokens", "5"])
    assert capsys.readouterr().err == ""  # within the trained length there is nothing to say
    export(load_run(Path(run)), Path(run) / "hf")
    assert generated(capsys, f"{run}/hf", "--prompt", "def ", "--tokens", "50")["text"] == result["text"]


def test_control_tokens_in_a_prompt_stay_text(make_run: Callable[[], Path], tmp_path: Path) -> None:
    tokenizer = load_run(make_run()).tokenizer()
    assert EOS not in tokenizer.encode("a <|eos|> b").ids


def test_prompt_from_stdin_through_a_pipe(make_run: Callable[[], Path], corpus_cache: Path) -> None:
    run = make_run()

    def start(prompt: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "train.generate", str(run), "--prompt", "-", "--tokens", "20", *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            input=prompt,
            capture_output=True,
        )

    done = start("class Ä:\n".encode())
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("class Ä:\n".encode())
    done = start(b"\xff\xfe")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: the prompt is not UTF-8 text")
    assert done.stderr.count(b"\n") == 1


def test_without_a_prompt_a_document_begins(make_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    trained = load_run(run)
    result = generated(capsys, str(run), "--tokens", "10", "--temperature", "0")
    assert result["tokens"] == list(generate(trained.model(), [EOS], 10, GREEDY, stop=trained.eos))


def test_an_unfinished_run_says_so(
    make_spec: Callable[..., RunSpec],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = make_spec()
    run = RunDir(tmp_path / "run")
    run.create(spec)
    with pytest.raises(
        InputError, match=r"no checkpoint that can be read: train it with python -m train.run \S+/run"
    ):
        load_run(run.path)
    monkeypatch.setattr("train.engine.loop.stop_requested", lambda: True)
    with pytest.raises(Interrupted):
        train(spec, run, Host())
    load_run(run.path)
    assert f"run {spec.run_id} is not finished: step 1 of 60" in capsys.readouterr().err


def test_folders_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match=r"no trained model at .*: give a run's folder"):
            entry.main([str(folder)])
    with pytest.raises(InputError, match="--tokens 0: must be at least 1"):
        entry.main([str(tmp_path), "--tokens", "0"])
    with pytest.raises(InputError, match="--seed -1: must be from 0"):
        entry.main([str(tmp_path), "--seed", "-1"])
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device cuda: this machine has no GPU"):
            entry.main([str(tmp_path), "--device", "cuda"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(InputError, match="not UTF-8"):
        entry.read_prompt("-")
