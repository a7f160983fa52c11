"""ENTRY python -m train.generate: text from a trained run, or from a Hugging Face directory."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from scaling.errors import InputError, run_command

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EPILOG = """\
examples:
  python -m train.generate out/demo/flagship --prompt "def "
  git show HEAD:setup.py | python -m train.generate out/demo/flagship --prompt - --tokens 50 --temperature 0
  python -m train.generate out/flagship_hf --json -              what train.export wrote

Without a prompt a new document begins. The model reads no more tokens than it was trained on (seq_len): beyond that,
the last three quarters of them are read again and the older text is forgotten. Equal arguments give equal text on
one machine.
"""


def main(argv: list[str]) -> None:
    """Parse the arguments, load the model, and print text as it comes."""
    parser = argparse.ArgumentParser(
        "python -m train.generate", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="a run's folder, or a Hugging Face directory")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text to go on from; - reads it from stdin")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="most tokens to write (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: no chance (default: 0.8)")
    parser.add_argument(
        "--top-k", type=int, default=50, metavar="K", help="the K likeliest tokens alone (default: 50)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="the likeliest share P (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (default: 0)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default: cpu)")
    parser.add_argument("--json", metavar="-", choices=["-"], help="print one JSON object on stdout")
    args = parser.parse_args(argv)
    if args.tokens < 1:
        raise InputError(f"--tokens {args.tokens}: must be at least 1")
    if not 0 <= args.seed < 2**63:
        raise InputError(f"--seed {args.seed}: must be from 0 to 2^63 - 1")
    prompt = read_prompt(args.prompt)

    import torch  # 2 s, after the arguments are known to be good

    from train.model.sampling import Sampling, generate, window_tokens
    from train.trained import load_trained

    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no GPU that torch can use; leave it out")
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    trained = load_trained(args.model)
    model, tokenizer = trained.model(args.device), trained.tokenizer()
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or list(trained.eos[:1])
    if not ids:
        raise InputError(f"{args.model} names no token that ends a document, so none can begin: give a --prompt")
    seq_len = trained.shape.seq_len
    if len(ids) + args.tokens > seq_len:
        print(
            f"{trained.name} was trained on {seq_len} tokens at a time: it sees the last {window_tokens(seq_len)} to "
            f"{seq_len} tokens of the text, of {len(ids)} in the prompt and up to {args.tokens} to come",
            file=sys.stderr,
        )
    new: list[int] = []
    started = time.monotonic()
    tokens = generate(model, ids, args.tokens, sampling, args.seed, trained.eos)
    if not args.json:
        print(prompt, end="", flush=True)
    for text in stream(tokenizer, tokens, new):
        if not args.json:
            print(text, end="", flush=True)
    seconds = time.monotonic() - started
    stopped = "eos" if new[-1] in trained.eos else "tokens"
    if not args.json:
        print()
        return
    result = {
        "model": trained.name,
        "prompt": prompt,
        "text": tokenizer.decode(new),
        "tokens": new,
        "stopped": stopped,
        "seq_len": seq_len,
        "seed": args.seed,
        "tokens_per_s": len(new) / seconds,
    }
    print(json.dumps(result))


def read_prompt(prompt: str) -> str:
    """The prompt, or stdin where it is `-`.

    Raises:
        InputError: not UTF-8.
    """
    raw = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt is not UTF-8 text ({error}): convert it, e.g. with iconv -t UTF-8") from None


def stream(tokenizer: Tokenizer, tokens: Iterator[int], seen: list[int]) -> Iterator[str]:
    """The tokens' text, piece by piece; bytes of a character that is not complete wait for the rest of it.

    Args:
        seen: every token is added to it.
    """
    from tokenizers.decoders import DecodeStream

    decoder = DecodeStream(skip_special_tokens=True)
    written = 0
    for token in tokens:
        seen.append(token)
        text = decoder.step(tokenizer, token)
        if text:
            written += len(text)
            yield text
    yield tokenizer.decode(seen)[written:]


if __name__ == "__main__":
    run_command(main)
