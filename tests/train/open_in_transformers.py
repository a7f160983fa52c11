"""What transformers makes of exported directories: run by test_export.py, once for each version, in its own process.

python open_in_transformers.py DIR…: each has questions.json, {"tokens": [[id…]…], "texts": […], "prompt": [id…]}; writes
answers.safetensors (logits), answers.json and saved/, the directory as this version of transformers saves it.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(folder: Path) -> None:
    questions = json.loads((folder / "questions.json").read_text())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model.eval()
        with torch.no_grad():
            logits = model(torch.tensor(questions["tokens"])).logits
        generated = model.generate(torch.tensor([questions["prompt"]]), do_sample=False, max_new_tokens=8)
    save_file({"logits": logits.contiguous()}, folder / "answers.safetensors")
    answers = {
        "version": transformers.__version__,
        "architecture": type(model).__name__,
        "dtype": str(model.dtype),
        "loading": {name: sorted(map(str, value)) for name, value in loading.items() if value},
        "warnings": [str(w.message) for w in caught],
        "ids": [tokenizer(text)["input_ids"] for text in questions["texts"]],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"]) for text in questions["texts"]],
        "eos": [tokenizer.eos_token_id, model.generation_config.eos_token_id],
        "pad": tokenizer.pad_token_id,
        "generated": generated[0, len(questions["prompt"]) :].tolist(),
        "temperature": model.generation_config.temperature,
    }
    (folder / "answers.json").write_text(json.dumps(answers))
    model.save_pretrained(folder / "saved")
    tokenizer.save_pretrained(folder / "saved")


for path in sys.argv[1:]:
    answer(Path(path))
