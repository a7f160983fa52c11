"""Export to a Hugging Face directory: what transformers computes from it, and the way back."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scaling.errors import InputError
from scaling.records import DataManifest
from scaling.shape import ModelShape
from scaling.spec import RunSpec
from scaling.sweepdir import RunDir
from train import export as entry
from train.data.shards import Corpus
from train.data.tokenizer import EOS
from train.engine import train
from train.export import export
from train.model.decoder import Decoder
from train.model.huggingface import config_of, shape_of
from train.model.sampling import Sampling, generate
from train.trained import Trained, load_huggingface, load_run, load_trained

ROOT = Path(__file__).resolve().parents[2]
BASE = ModelShape(width=32, depth=2, n_heads=4, d_ff=88, vocab_size=300, seq_len=48)
SHAPES = {
    "qwen3": BASE,
    "qwen3_grouped_tied": dataclasses.replace(BASE, n_kv_heads=2, head_dim=6, tied_embeddings=True, rope_theta=5e5),
    "llama": dataclasses.replace(BASE, qk_norm=False, rope_theta=5e5),
    "llama_grouped_tied": dataclasses.replace(BASE, qk_norm=False, n_kv_heads=1, head_dim=12, tied_embeddings=True),
}
TEXTS = ["def f(x):\n    return x + 1\n", "  naïve €5 😀\r\n\t", "a" * 40, ""]


@pytest.fixture(scope="module")
def tokenizer_json(manifest: DataManifest, corpus_cache: Path) -> str:
    return (Corpus.open(manifest.digest, corpus_cache).folder / "tokenizer.json").read_text()


@pytest.fixture(scope="module")
def make_trained(tokenizer_json: str) -> Callable[[ModelShape], Trained]:
    """A model whose gains are no ones, so that a norm in another's place shows."""

    def make(shape: ModelShape) -> Trained:
        model = Decoder(shape)
        model.initialise(1)
        generator = torch.Generator().manual_seed(2)
        weights = {
            name: w + 0.3 * torch.randn(w.shape, generator=generator) if w.ndim == 1 else w
            for name, w in model.state_dict().items()
        }
        return Trained("made", shape, "fp32", weights, tokenizer_json, (EOS,))

    return make


@pytest.fixture
def make_run(make_spec: Callable[..., RunSpec], tmp_path: Path) -> Callable[[], Path]:
    """A run of 40 steps."""

    def make() -> Path:
        spec = make_spec(steps=40)
        train(spec, RunDir(tmp_path / spec.run_id))
        return tmp_path / spec.run_id

    return make


# --- in transformers


def transformers_path(major: int) -> str | None:
    """PYTHONPATH under which this major version is found, or None: `make test` puts both into .venv/transformers."""
    for folder in (Path(sys.prefix) / "transformers").glob(f"{major}.*"):
        return str(folder)
    if find_spec("transformers") is not None:
        import importlib.metadata

        return "" if importlib.metadata.version("transformers").startswith(f"{major}.") else None
    return None


@pytest.mark.slow
@pytest.mark.parametrize("major", [4, 5])
def test_transformers_computes_the_same(
    major: int, make_trained: Callable[[ModelShape], Trained], make_run: Callable[[], Path], tmp_path: Path
) -> None:
    path = transformers_path(major)
    if path is None:
        pytest.skip(f"no transformers {major} in {sys.prefix}/transformers: make {sys.prefix}/transformers/.done")
    models = {name: make_trained(shape) for name, shape in SHAPES.items()} | {"run": load_run(make_run())}
    generator = torch.Generator().manual_seed(0)
    tokens = {}
    for name, trained in models.items():
        export(trained, tmp_path / name)
        tokens[name] = torch.randint(0, 300, (3, trained.shape.seq_len), generator=generator)
        questions = {"tokens": tokens[name].tolist(), "texts": TEXTS, "prompt": tokens[name][0, :10].tolist()}
        (tmp_path / name / "questions.json").write_text(json.dumps(questions))
    script = Path(__file__).with_name("open_in_transformers.py")
    done = subprocess.run(
        [sys.executable, str(script), *(str(tmp_path / name) for name in models)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, trained in models.items():
        answers = json.loads((tmp_path / name / "answers.json").read_text())
        model, tokenizer = trained.model(), trained.tokenizer()
        with torch.no_grad():
            logits = model(tokens[name])
        theirs = load_file(tmp_path / name / "answers.safetensors")["logits"]
        difference = float((logits - theirs).abs().max())
        print(f"transformers {answers['version']} {name}: largest difference of logits {difference:.1e}")
        assert difference <= 1e-5
        assert answers["version"].startswith(f"{major}.")
        assert answers["architecture"] == ("Qwen3ForCausalLM" if trained.shape.qk_norm else "LlamaForCausalLM")
        assert answers["dtype"] == "torch.float32"
        assert answers["loading"] == {}  # no key missing, unexpected, or of another size
        assert answers["ids"] == [tokenizer.encode(text).ids for text in TEXTS]
        assert answers["decoded"] == TEXTS
        assert answers["eos"] == [EOS, EOS]
        assert answers["pad"] == 2
        assert answers["temperature"] == Sampling().temperature
        ours = list(generate(model, tokens[name][0, :10].tolist(), 8, Sampling(temperature=0), stop=(EOS,)))
        assert answers["generated"] == ours
        back = load_huggingface(tmp_path / name / "saved")  # as that version wrote it
        assert config_of(back.shape) == config_of(trained.shape)
        assert back.eos == (EOS,)
        torch.testing.assert_close(back.weights, dict(trained.weights), rtol=0, atol=0)


# --- and back


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_come_back_bit_for_bit(
    shape: ModelShape, make_trained: Callable[[ModelShape], Trained], tmp_path: Path
) -> None:
    trained = make_trained(shape)
    export(trained, tmp_path / "out")
    back = load_trained(tmp_path / "out")
    torch.testing.assert_close(back.weights, dict(trained.weights), rtol=0, atol=0)
    assert config_of(back.shape) == config_of(shape)
    assert back.tokenizer_json == trained.tokenizer_json
    assert back.eos == trained.eos
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_command_exports_the_trained_model(
    make_run: Callable[[], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    entry.main([str(run), str(tmp_path / "out"), "--json", "-"])
    said = json.loads(capsys.readouterr().out)
    assert said["out"] == str(tmp_path / "out")
    assert said["config"] == json.loads((tmp_path / "out" / "config.json").read_text())
    state = torch.load(next((run / "checkpoints").glob("*.pt")), weights_only=True)
    back = load_trained(tmp_path / "out")
    torch.testing.assert_close(back.weights, dict(state["model"]), rtol=0, atol=0)


def test_bfloat16_halves_the_weights_and_rounds_them(
    make_trained: Callable[[ModelShape], Trained], tmp_path: Path
) -> None:
    trained = make_trained(BASE)
    config = export(trained, tmp_path / "out", "bfloat16")
    assert config["dtype"] == "bfloat16"
    file = tmp_path / "out" / "model.safetensors"
    assert {w.dtype for w in load_file(file).values()} == {torch.bfloat16}
    rounded = {name: w.bfloat16().float() for name, w in trained.weights.items()}
    torch.testing.assert_close(load_huggingface(tmp_path / "out").weights, rounded, rtol=0, atol=0)


# --- input that cannot be used


def test_what_is_there_is_not_overwritten(make_trained: Callable[[ModelShape], Trained], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(InputError, match="is there already and not an empty folder"):
            export(make_trained(BASE), tmp_path / name)
    (tmp_path / "empty").mkdir()
    export(make_trained(BASE), tmp_path / "empty")
    assert load_trained(tmp_path / "empty").shape.width == 32


def test_a_llama_whose_heads_do_not_divide_its_width(
    make_trained: Callable[[ModelShape], Trained], tmp_path: Path
) -> None:
    shape = dataclasses.replace(BASE, qk_norm=False, n_heads=5, head_dim=8)
    with pytest.raises(InputError, match="width 32 is not a multiple of 5 heads"):
        export(make_trained(shape), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "unknown model_type 'gpt2'.*valid: llama, qwen3"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps = 1e-05: the decoder has 1e-06 alone"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_size": "wide"}, "expected int, got 'wide'"),
        ({"num_attention_heads": 0}, "n_heads = 0: must be at least 1"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type = 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type = 'linear'"),
    ],
)
def test_models_that_the_decoder_is_not(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        shape_of({**config_of(BASE), **change})


def test_a_config_without_what_it_needs() -> None:
    config = config_of(BASE)
    del config["head_dim"], config["vocab_size"]
    with pytest.raises(InputError, match=r"config.json lacks vocab_size, head_dim"):
        shape_of(config)


def test_damaged_directories(make_trained: Callable[[ModelShape], Trained], tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(make_trained(BASE), out)
    weights = load_file(out / "model.safetensors")
    gone = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, out / "model.safetensors")
    with pytest.raises(InputError, match=r"1 tensors .*up_proj.weight is missing where \(88, 32\) is expected"):
        load_huggingface(out)
    save_file(weights | {"model.layers.1.mlp.up_proj.weight": gone.T.contiguous()}, out / "model.safetensors")
    with pytest.raises(InputError, match=r"is \(32, 88\) where \(88, 32\) is expected"):
        load_huggingface(out)
    (out / "tokenizer.json").write_text("{}")
    save_file(weights | {"model.layers.1.mlp.up_proj.weight": gone}, out / "model.safetensors")
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        load_huggingface(out).tokenizer()
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot read the model in"):
        load_huggingface(out)
    file.unlink()
    with pytest.raises(InputError, match="cannot read the model in"):
        load_huggingface(out)
