"""Tokens/s of whole runs of over two minutes on the CPU: what the engine offers against a plain eager fp32 loop.

Plain is what one writes by hand: forward, backward, clipping, step, loss read back, in fp32 without compilation, on batches cut
before the clock starts. The engine's run is all of `train` with the settings, compilation, evaluation and record included.
Each is a process of its own. ratio: the engine's tokens/s over plain's, by wall clock and by processor seconds; the latter
is what a busy machine can still tell.

python bench/cpu.py [--width 256] [--minutes 2.5] [--precision auto] [--compile auto]    (on data=stdlib; table last)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from scaling.cost import run_seconds
from scaling.errors import InputError, run_command
from scaling.hardware import find_device
from scaling.precision import choose, has_bf16_products
from scaling.shape import ShapeFamily
from scaling.spec import DataSpec, EvalSpec, OptimSpec, RunSpec, ScheduleSpec
from scaling.sweepdir import RunDir
from train.data.loader import Corpus, Loader
from train.data.shards import prepare
from train.engine import Host, train
from train.engine.optim import Optimizers
from train.model.decoder import Decoder

CPU = find_device("cpu")
BATCH_TOKENS = 4096
CALIBRATION_STEPS = 3


def make_spec(width: int, precision: str, steps: int, digest: str) -> RunSpec:
    """Four layers, sequences of 256 tokens, Muon."""
    shape = ShapeFamily(vocab_size=512, seq_len=256, depth=4, n_heads=4).shape(width)
    return RunSpec(
        shape=shape,
        data=DataSpec("stdlib", digest=digest, max_epochs=1e6),
        tokens=steps * BATCH_TOKENS,
        batch_tokens=BATCH_TOKENS,
        optim=OptimSpec("muon", 0.01),
        schedule=ScheduleSpec("wsd", warmup_tokens=0),
        eval=EvalSpec(BATCH_TOKENS, points=1),
        precision=precision,  # type: ignore[arg-type]
    )


def plain(spec: RunSpec) -> None:
    """The loop that one writes by hand, in fp32."""
    corpus = Corpus.open(str(spec.data.digest))
    loader = Loader.of(spec, corpus)
    model = Decoder(spec.shape)
    model.initialise(spec.seed)
    optimizers = Optimizers(model, spec.optim, "fp32")
    parameters = list(model.parameters())
    for step in range(spec.steps):
        inputs_BT, targets_BT = loader.batch(step)
        loss = model.loss(inputs_BT, targets_BT) / spec.batch_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, spec.optim.clip_norm)
        optimizers.step(1.0)
        loss.item()


def one(which: str, spec: RunSpec, host: Host) -> tuple[float, float]:
    """Wall and processor seconds of one of the two, in this process: from a process that has imported everything."""
    wall, cpu = time.perf_counter(), time.process_time()
    if which == "plain":
        plain(spec)
    else:
        with tempfile.TemporaryDirectory() as folder:
            record = train(spec, RunDir(Path(folder) / "runs" / spec.run_id), host)
        if record.status != "ok":
            raise InputError(f"the run {record.status}: {record.reason}")
    return time.perf_counter() - wall, time.process_time() - cpu


def in_process(which: str, args: argparse.Namespace, steps: int) -> tuple[float, float]:
    """`one` in a new process."""
    command = [sys.executable, __file__, "--child", which, "--steps", str(steps), "--width", str(args.width)]
    command += ["--precision", args.precision, "--compile", args.compile]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    wall, cpu = json.loads(done.stdout.splitlines()[-1])
    return wall, cpu


def main(argv: list[str]) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=2.5, help="of the engine's run (default 2.5)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--compile", default="auto", choices=["none", "block", "whole", "auto"])
    parser.add_argument("--child", choices=["plain", "engine"], help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    digest = prepare("stdlib", None, 512, progress=False).digest
    if args.child:
        spec = make_spec(args.width, args.precision, args.steps, digest)
        print(json.dumps(one(args.child, spec, Host(compile=args.compile))))
        return
    steps = args.steps
    if args.precision == "auto":
        expected_s = run_seconds(make_spec(args.width, "fp32", steps, digest), CPU) if steps else 60 * args.minutes
        args.precision, why = choose("cpu", expected_s, args.width, has_bf16_products())
        print(f"precision={args.precision}: {why}")
    if steps is None:
        calibration = make_spec(args.width, args.precision, CALIBRATION_STEPS, digest)
        one("engine", calibration, Host())  # imports
        seconds, _ = one("engine", dataclasses.replace(calibration, seed=1), Host())
        steps = max(CALIBRATION_STEPS, round(60 * args.minutes / seconds * CALIBRATION_STEPS * 1.25))
    rows = {which: in_process(which, args, steps) for which in ("plain", "engine")}
    print(
        f"width {args.width}, {steps} steps of {BATCH_TOKENS} tokens; engine: {args.precision}, compile={args.compile}\n"
    )
    print("| | wall s | processor s | tokens/s, wall | tokens/processor s |\n|---|---|---|---|---|")
    tokens = steps * BATCH_TOKENS
    for which, (wall, cpu) in rows.items():
        print(f"| {which} | {wall:.1f} | {cpu:.1f} | {tokens / wall:,.0f} | {tokens / cpu:,.0f} |")
    ratios = (a / b for a, b in zip(rows["plain"], rows["engine"], strict=True))
    print("| ratio | | | " + " | ".join(f"×{ratio:.2f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    run_command(main)
