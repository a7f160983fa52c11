"""ENTRY python -m train.export: a trained run as a Hugging Face directory, Qwen3 with QK-norm, Llama without."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaling.errors import InputError, run_command
from scaling.files import write_json, write_text
from scaling.sweepdir import check_writable

if TYPE_CHECKING:
    from train.trained import Trained

EPILOG = """\
example:
  python -m train.export out/demo/flagship out/flagship_hf
  python -m train.generate out/flagship_hf --prompt "def "      reads it back

The directory opens with AutoModelForCausalLM and AutoTokenizer of transformers 4.57 and 5.
Weights are written in fp32 as they were trained; --dtype bfloat16 halves the file and rounds them.
"""


def main(argv: list[str]) -> None:
    """Parse the arguments, export, and say what was written."""
    parser = argparse.ArgumentParser(
        "python -m train.export", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run's folder")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="the new directory")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: float32)")
    parser.add_argument("--json", metavar="-", choices=["-"], help="print one JSON object on stdout")
    args = parser.parse_args(argv)

    from train.trained import load_run  # torch: 2 s, after the arguments are known to be good

    trained = load_run(args.run)
    config = export(trained, args.out, args.dtype)
    if args.json:
        print(json.dumps({"out": str(args.out), "model": trained.name, "config": config}))
    else:
        print(f"{config['architectures'][0]} of run {trained.name} in {args.out}")


def export(trained: Trained, out: Path, dtype: str = "float32") -> dict[str, Any]:
    """Write config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    Args:
        out: appears whole, or not at all.
        dtype: of the weights, float32 | bfloat16.
    Returns:
        What config.json holds.
    Raises:
        InputError: `out` is there and not empty, or cannot be written; a shape that has no architecture there.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from train.model.huggingface import config_of
    from train.model.sampling import Sampling

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already and not an empty folder: give a new OUT_DIR, or delete it")
    config = {**config_of(trained.shape), "dtype": dtype, "torch_dtype": dtype, **_control_token_ids()}
    weights = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in trained.weights.items()}
    if trained.shape.tied_embeddings:
        del weights["lm_head.weight"]
    default = Sampling()
    check_writable(out.parent)
    building = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        write_json(building / "config.json", config)
        write_json(
            building / "generation_config.json",
            {"do_sample": True, "temperature": default.temperature, "top_k": default.top_k, **_control_token_ids()},
        )
        write_json(
            building / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|eos|>",
                "pad_token": "<|pad|>",
                "model_max_length": trained.shape.seq_len,
                "clean_up_tokenization_spaces": False,
            },
        )
        write_text(building / "tokenizer.json", trained.tokenizer_json)
        save_file(weights, building / "model.safetensors", metadata={"format": "pt"})
        os.chmod(building / "model.safetensors", 0o644)  # safetensors makes it 0600, mkdtemp the folder 0700
        os.chmod(building, 0o755)
        building.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return config


def _control_token_ids() -> dict[str, int | None]:
    """Documents end with <|eos|> and nothing stands before them: a <|bos|> would be a token that was never trained."""
    from train.data.tokenizer import CONTROL_TOKENS, EOS

    return {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": CONTROL_TOKENS.index("<|pad|>")}


if __name__ == "__main__":
    run_command(main)
