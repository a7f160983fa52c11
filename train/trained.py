"""A trained model from disk: a run's folder, or a Hugging Face directory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scaling.errors import InputError
from scaling.files import read_json
from scaling.shape import ModelShape
from scaling.sweepdir import RunDir
from train.data.shards import Corpus
from train.data.tokenizer import EOS
from train.engine import checkpoint
from train.model.decoder import Decoder, folded
from train.model.huggingface import shape_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Trained:
    """What a model needs to be used."""

    name: str
    """The run's id and step, or the directory."""
    shape: ModelShape
    precision: str
    """What it computed in when it was trained."""
    weights: dict[str, Tensor]
    """fp32, by the decoder's names, on the CPU."""
    tokenizer_json: str
    """The tokenizer, as `tokenizers` serialises it."""
    eos: tuple[int, ...]
    """Ids that end a document."""

    def model(self, device: str = "cpu") -> Decoder:
        """The decoder, for inference."""
        weights = {name: tensor.to(device) for name, tensor in self.weights.items()}
        return Decoder.of_weights(self.shape, weights, self.precision).eval()

    def tokenizer(self) -> Tokenizer:
        """Its tokenizer; text that spells a control token stays text.

        Raises:
            InputError: damaged, or made by a newer version of tokenizers.
        """
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(self.tokenizer_json)
        except Exception as error:  # tokenizers has no class of its own for it
            raise InputError(f"cannot read the tokenizer of {self.name}: {error}") from None
        tokenizer.encode_special_tokens = True
        return tokenizer


def load_trained(folder: Path) -> Trained:
    """A run's folder, or a Hugging Face directory.

    Raises:
        InputError: neither, or what `load_run` and `load_huggingface` refuse.
    """
    if (folder / "config.json").exists():
        return load_huggingface(folder)
    return load_run(folder)


def load_run(folder: Path) -> Trained:
    """The newest readable checkpoint of a run; says so on stderr where the run is not at its end.

    Raises:
        InputError: no run there, or one without a checkpoint; its corpus, whose tokenizer it reads, is not prepared.
    """
    run = RunDir(folder)
    if not run.spec_json.exists():
        raise InputError(
            f"no trained model at {folder}: give a run's folder (sweeps/NAME/runs/RUN_ID, or a flagship's), or a "
            "Hugging Face directory"
        )
    spec = run.spec()
    state = checkpoint.load_latest(run.checkpoints)
    if state is None:
        raise InputError(
            f"run {folder} has no checkpoint that can be read: train it with python -m train.run {folder}"
        )
    if state["run_id"] != spec.run_id:
        raise InputError(f"checkpoint of run {state['run_id']} in the folder of run {spec.run_id}: delete it")
    assert spec.data.digest is not None, "the launcher resolves the corpus"
    tokenizer = Corpus.open(spec.data.digest).folder / "tokenizer.json"
    step, record = state["step"], run.record()
    if record is not None and record.status != "ok":
        print(f"run {spec.run_id} {record.status}: these are its weights at step {step}", file=sys.stderr)
    elif step < spec.steps:
        print(f"run {spec.run_id} is not finished: step {step} of {spec.steps}", file=sys.stderr)
    name = f"{spec.run_id} step {step}"
    weights = folded(state["model"], spec.multipliers)
    return Trained(name, spec.shape, spec.precision, weights, tokenizer.read_text(encoding="utf-8"), (EOS,))


def load_huggingface(folder: Path) -> Trained:
    """A Qwen3 or Llama directory with its weights in one model.safetensors; computes in fp32.

    Raises:
        InputError: a file is missing or damaged, or the model has what the decoder does not have.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config: dict[str, Any] = read_json(folder / "config.json", "Hugging Face config")
    shape = shape_of(config)
    try:
        weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
        tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read the model in {folder}: {error}") from None
    if shape.tied_embeddings and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    _check_weights(shape, weights, folder)
    eos = config.get("eos_token_id")
    stop = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    return Trained(str(folder), shape, "fp32", weights, tokenizer_json, stop)


def _check_weights(shape: ModelShape, weights: dict[str, Tensor], folder: Path) -> None:
    """Refuse tensors other than config.json's shape has."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Decoder(shape).state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise InputError(
            f"{folder}: {len(wrong)} tensors are not those of its config.json; {name} is "
            f"{_size(found.get(name))} where {_size(expected.get(name))} is expected"
        )


def _size(size: torch.Size | None) -> str:
    return "missing" if size is None else str(tuple(size))
