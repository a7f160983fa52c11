"""What the engine reaches on this device: tokens/s, MFU, memory and the parts of a step, beside a large matmul of the same call.

python bench/gpu.py                 on a GPU: the table below; random tokens, tables last
python bench/gpu.py --sweep DIR     on a GPU: a real sweep, its sealed forecast, and the run that it forecasts (bench/gpu_sweep.py)
python bench/gpu.py --device cpu    the same code on small shapes; what a CPU cannot do says so in its row

Rows: 1.44B, 125M, 50M and 10M parameters, in bf16 unless said, eager and compiled, with and without CUDA graphs; 1.44B in fp8;
2 and 4 processes that share the device; 8 runs of 10M one after another, in processes, and stacked. × is tokens/s over the
first row of the same model, of all runs together. MFU is over the bf16 peak, also in fp8, with causal attention halved, then
not. A row that fails says why and leaves the others; rows that --minutes leaves no time for say that. Starting a run is in no
figure. From a clone that is not installed: PYTHONPATH=. python bench/gpu.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_rows import Job, Measured, RowError, Workers

from scaling.accounting import count_params, flops_per_token, training_bytes
from scaling.errors import InputError, run_command, unknown
from scaling.hardware import match_device
from scaling.shape import ModelShape

ROW_LIMIT_S = 300.0
"""A row that takes longer, compilation included, is given up."""
GRACE_S = 30.0
"""What a row may still take when the time is up."""
HEADER = "| model | setting | tokens/s | × | MFU | attention not halved | step, ms | GB, of predicted |\n|---|---|---|---|---|---|---|---|"


def shape_of(width: int, depth: int, d_ff: int, vocab_size: int = 50304, seq_len: int = 2048) -> ModelShape:
    """Heads of 128, or of 64 in narrow models."""
    return ModelShape(width, depth, max(1, width // (128 if width >= 1024 else 64)), d_ff, vocab_size, seq_len)


LARGE = Job("1.44B", shape_of(2048, 24, 5632), 32768, 8)
SMALL = (
    Job("10M", shape_of(256, 6, 704, 8192, 1024), 65536, 60),
    Job("50M", shape_of(512, 8, 1408, 32768), 65536, 30),
    Job("125M", shape_of(768, 12, 2048), 65536, 20),
)
EIGHT = Job("8 × 10M", SMALL[0].shape, 32768, 60, micro_batch_tokens=16384)
"""The plain loop at the engine's own micro-batch; the batch is about Step Law's at 20 tokens a parameter."""
EIGHT_SHORT = Job("8 × 10M, short batch", SMALL[0].shape, 8192, 60)
"""As at 3 tokens a parameter, where a step is mostly waiting for kernels to start."""
TINY = Job("small", shape_of(64, 2, 176, 512, 64), 256, 2)


def jobs(cuda: bool) -> list[Job]:
    """The rows, in the order in which they are wanted."""
    if not cuda:
        return [
            replace(TINY, families=True),
            replace(TINY, cuda_graphs=True),
            replace(TINY, precision="fp8"),
            replace(TINY, compile="block"),
            replace(TINY, processes=2),
            replace(TINY, stacked=3),
            replace(TINY, micro_batch_tokens=128),
        ]
    rows = [replace(LARGE, compile="block", families=True), replace(LARGE, precision="fp8", compile="block")]
    for job in SMALL:
        rows += [
            replace(job, families=job is SMALL[0]),
            replace(job, cuda_graphs=True),
            replace(job, compile="block"),
        ]
        rows += [replace(job, compile="block", cuda_graphs=True, families=job is SMALL[0])]
    whole = replace(EIGHT, micro_batch_tokens=None)
    rows += [EIGHT, whole, replace(whole, stacked=8), replace(whole, cuda_graphs=True)]
    rows += [replace(whole, compile="block", cuda_graphs=True), replace(EIGHT, processes=8)]
    rows += [replace(whole, compile="block", cuda_graphs=True, processes=n) for n in (2, 4, 8)]
    rows += [EIGHT_SHORT, replace(EIGHT_SHORT, stacked=8), replace(EIGHT_SHORT, cuda_graphs=True)]
    rows += [replace(EIGHT_SHORT, compile="block", cuda_graphs=True, processes=n) for n in (1, 8)]
    rows += [LARGE, replace(LARGE, compile="whole")]
    rows += [replace(job, processes=n) for n in (2, 4) for job in SMALL]
    rows += [replace(job, compile="block", cuda_graphs=True, processes=n) for n in (2, 4) for job in SMALL]
    rows += [replace(job, compile="whole", cuda_graphs=graphs) for job in SMALL for graphs in (False, True)]
    return [*rows, replace(LARGE, precision="fp8"), replace(LARGE, precision="fp8", compile="whole")]


def figures(job: Job, found: Sequence[Measured], peak_flops: float, first: float | None) -> tuple[str, float]:
    """A row of the table, and its tokens/s.

    Args:
        peak_flops: the device's, bf16.
        first: tokens/s of the model's first row.
    """
    seconds = max(m.ended for m in found) - min(m.began for m in found)
    rate = sum(m.tokens for m in found) / seconds
    mfu, full = (flops_per_token(job.shape, causal).train * rate / peak_flops for causal in (True, False))
    parts = ", ".join(f"{part} {1e3 * s:.1f}" for part, s in found[0].parts_s.items())
    runs = job.processes * job.stacked
    precision = "fp32" if job.precision == "fp32" else "bf16"
    accumulates = job.pass_tokens < job.batch_tokens
    predicted = training_bytes(job.shape, job.pass_tokens, "adamw", precision, accumulates=accumulates).total
    row = (
        f"| {job.model} ({count_params(job.shape).total / 1e6:.4g}M) | {job.setting} | {rate:,.0f} | "
        f"{rate / (first or rate):.2f} | {mfu:.1%} | {full:.1%} | {1e3 * seconds / job.steps:.1f}"
        f"{f' ({parts})' if parts else ''} | {sum(m.peak_bytes for m in found) / 1e9:.2f} of {runs * predicted / 1e9:.2f} |"
    )
    return row, rate


def families(job: Job, found: Measured) -> str:
    """A row of the second table."""
    split = ", ".join(f"{family} {1e3 * s:.2f}" for family, s in found.families.items())
    return f"| {job.model} | {job.setting} | {1e3 * sum(found.families.values()):.2f} | {found.busy:.0%} | {split} |"


def measure_rows(wanted: Sequence[Job], device: str, until: float) -> None:
    """Measure, print each row when it is there, and the tables.

    Args:
        until: on the monotonic clock, when no further row begins.
    """
    workers: dict[int, Workers] = {}

    def call(processes: int, name: str, *args: object) -> list[Any]:
        if processes not in workers or not workers[processes].alive:
            workers[processes] = Workers(processes, device)
        left_s = max(GRACE_S, until + GRACE_S - time.monotonic()) if name == "measure" else ROW_LIMIT_S
        return workers[processes].call(name, *args, limit_s=min(ROW_LIMIT_S, left_s))

    rows, split, first = [], [], dict[str, float]()
    try:
        try:
            (name,) = call(1, "name")
        except RowError as error:
            raise InputError(str(error)) from None
        known = match_device(name)
        peak = known.peak("bf16") if known else float("nan")
        heads = [f"{name}; bf16 peak {peak / 1e12:.4g} TFLOP/s; attention by {call(1, 'attention')[0]}"]
        for dtype in ("bf16", "fp8") if device == "cuda" else ("bf16",):
            size = 8192 if device == "cuda" else 256
            try:
                (best,) = call(1, "matmul", dtype, size)
                heads.append(f"{size}³ {dtype} matmul {best / 1e12:.4g} TFLOP/s, {best / peak:.1%} of that peak")
            except RowError as error:
                heads.append(f"{size}³ {dtype} matmul: {error}")
        print("\n".join(heads), flush=True)
        for job in wanted:
            try:
                if time.monotonic() > until:
                    raise RowError("not run: no time left (--minutes)")
                found = call(job.processes, "measure", job)
                row, rate = figures(job, found, peak, first.get(job.model))
                first.setdefault(job.model, rate)
                if found[0].families:
                    split.append(families(job, found[0]))
            except RowError as error:
                row = f"| {job.model} | {job.setting} | {error} | | | | | |"
            rows.append(row)
            print(row, flush=True)
    finally:
        for some in workers.values():
            some.close()
    print("\n| model | setting | in kernels, ms a step | busy | by family, ms a step |\n|---|---|---|---|---|")
    print("\n".join([*split, "", *heads, "", HEADER, *rows]))


def main(argv: list[str]) -> int | None:
    """Measure, and print the tables; or sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--models", help="comma-separated: rows of these alone")
    parser.add_argument("--compile", help="comma-separated: rows of these settings alone (none, block, whole)")
    parser.add_argument("--minutes", type=float, default=9.0, help="no row begins later (default: 9)")
    parser.add_argument("--sweep", type=Path, metavar="DIR", help="a sweep, its forecast and the run, in this folder")
    parser.add_argument("--largest", type=float, metavar="FLOPS", help="with --sweep: of its largest run")
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="with --sweep: more settings")
    args = parser.parse_args(argv)
    until = time.monotonic() + 60 * args.minutes
    if args.sweep is not None:
        from gpu_sweep import sweep

        return sweep(args.sweep, args.device, args.largest, args.set)
    if args.largest is not None or args.set:
        raise InputError("--largest and --set belong to --sweep DIR: give it too")
    every = jobs(args.device == "cuda")
    chosen = every
    for option, of in (("models", lambda job: job.model), ("compile", lambda job: job.compile)):
        names = (getattr(args, option) or "").split(",") if getattr(args, option) else None
        for name in names or ():
            if name not in set(map(of, every)):
                raise unknown(f"--{option}", name, set(map(of, every)))
        chosen = [job for job in chosen if names is None or of(job) in names]
    measure_rows(chosen, args.device, until)
    return None


if __name__ == "__main__":
    run_command(main)
