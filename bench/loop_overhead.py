"""What the training loop costs over a bare one: tokens per second of both, in one process, turn by turn.

Bare is what one writes by hand for the same model, batch and optimizer: forward, backward, clipping, step, loss read
back, on batches cut before the clock starts. The loop is all of `train`: lease, loader, schedule, metrics, divergence
watch, checkpoints, record, with one evaluation of a single window. Both clocks include building the model.
ratio: loop / bare, so 1 means that the loop costs nothing; median over the pairs.

python bench/loop_overhead.py [--widths 16 56] [--seconds 4] [--repeats 5]   (on data=stdlib)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from scaling.errors import InputError, run_command
from scaling.grid import expand_grid
from scaling.spec import DataSpec, EvalSpec, RunSpec
from scaling.sweepdir import RunDir
from train.data.loader import Batch, Corpus, Loader
from train.data.shards import prepare
from train.engine import Host, train
from train.engine.optim import Optimizers
from train.model.decoder import Decoder

CALIBRATION_STEPS = 20


def demo_specs() -> dict[int, RunSpec]:
    """The demo's runs by width, the longest of each."""
    return {spec.shape.width: spec for spec in sorted(expand_grid(["+grid=demo"]).specs, key=lambda s: s.tokens)}


def shortened(spec: RunSpec, steps: int, digest: str) -> RunSpec:
    """The run cut to some steps, on another corpus, with next to no evaluation."""
    tokens = steps * spec.batch_tokens
    warmup = min(spec.schedule.warmup_tokens, tokens // 10)
    return dataclasses.replace(
        spec,
        tokens=tokens,
        data=DataSpec("stdlib", digest=digest),
        schedule=dataclasses.replace(spec.schedule, warmup_tokens=warmup),
        eval=EvalSpec(spec.shape.seq_len, points=1),
    )


def bare_s(spec: RunSpec, batches: list[Batch]) -> float:
    """Seconds of the bare loop."""
    start = time.perf_counter()
    model = Decoder(spec.shape, spec.precision)
    model.initialise(spec.seed)
    optimizers = Optimizers(model, spec.optim, spec.precision)
    parameters = list(model.parameters())
    for inputs_BT, targets_BT in batches:
        loss = model.loss(inputs_BT, targets_BT, spec.optim.z_loss) / spec.batch_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, spec.optim.clip_norm)
        optimizers.step(1.0)
        loss.item()
    return time.perf_counter() - start


def loop_s(spec: RunSpec) -> tuple[float, float]:
    """Seconds of `train` into a new folder, and the share of the steps' time that waited for data."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder) / "runs" / spec.run_id)
        start = time.perf_counter()
        record = train(spec, run, Host())
        seconds = time.perf_counter() - start
        if record.status != "ok":
            raise InputError(f"run at width {spec.shape.width} {record.status}: {record.reason}")
        return seconds, sum(row["data_wait_s"] for row in run.metrics()) / record.train_s


def measure(spec: RunSpec, corpus: Corpus, seconds: float, repeats: int) -> dict[str, Any]:
    """Both loops in turn, the order changing from pair to pair."""
    loader = Loader(corpus.train, spec.shape.seq_len, spec.batch_tokens, spec.seed)
    bare_s(spec, [loader.batch(0)])  # the first step ever allocates, imports and picks kernels
    loop_s(shortened(spec, CALIBRATION_STEPS, corpus.manifest.digest))
    step_s = bare_s(spec, [loader.batch(step) for step in range(CALIBRATION_STEPS)]) / CALIBRATION_STEPS
    spec = shortened(spec, max(CALIBRATION_STEPS, round(seconds / step_s)), corpus.manifest.digest)
    batches = [loader.batch(step) for step in range(spec.steps)]
    bare, loop, waits = [], [], []
    for repeat in range(repeats):
        for which in ("bare", "loop") if repeat % 2 else ("loop", "bare"):
            if which == "bare":
                bare.append(bare_s(spec, batches))
            else:
                loop_seconds, wait = loop_s(spec)
                loop.append(loop_seconds)
                waits.append(wait)
    ratios = [b / a for a, b in zip(loop, bare, strict=True)]
    return {
        "width": spec.shape.width,
        "batch_tokens": spec.batch_tokens,
        "steps": spec.steps,
        "bare_tokens_per_s": round(spec.tokens / statistics.median(bare)),
        "loop_tokens_per_s": round(spec.tokens / statistics.median(loop)),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "data_wait_share": round(statistics.median(waits), 5),
    }


def main(argv: list[str]) -> None:
    """Measure and print one JSON object a width."""
    specs = demo_specs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[min(specs), max(specs)],
        help="of the demo's grid (default: its ends)",
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long one turn takes (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of turns (default 5)")
    args = parser.parse_args(argv)
    for width in args.widths:
        if width not in specs:
            raise InputError(f"--widths {width}: the demo's grid has {', '.join(map(str, sorted(specs)))}")
    if args.repeats < 1 or args.seconds <= 0:
        raise InputError(f"--repeats {args.repeats} --seconds {args.seconds}: must be positive")
    torch.set_num_threads(1)
    for width in args.widths:
        corpus = Corpus.open(prepare("stdlib", None, specs[width].shape.vocab_size).digest)
        print(json.dumps(measure(specs[width], corpus, args.seconds, args.repeats)), flush=True)


if __name__ == "__main__":
    run_command(main)
