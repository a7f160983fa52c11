"""Peak memory of a training step against the accounting's prediction: six shapes × recomputation × one rank and two shards.

python bench/memory.py [--tokens 2048] [--shards 1 2] [--quick]
    on the CPU, by torch's own account of every allocation; of several ranks (FSDP, gloo) the fullest; table last
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler._utils import traverse_dfs

from scaling.accounting import training_bytes
from scaling.errors import run_command
from scaling.ranks import run_ranks
from scaling.shape import Experts, ModelShape
from scaling.spec import DataSpec, EvalSpec, OptimSpec, RunSpec, ScheduleSpec
from train.engine.optim import Optimizers
from train.engine.parallel.model import ParallelModel, parallel_model
from train.engine.parallel.shards import local_part
from train.engine.parallel.world import World, find_world, join, leave
from train.model.decoder import Decoder
from train.model.kernels import set_up

BASE = ModelShape(width=256, depth=4, n_heads=4, d_ff=688, vocab_size=512, seq_len=256)
CASES: dict[str, tuple[ModelShape, str, str]] = {
    "base": (BASE, "muon", "fp32"),
    "deep, bf16": (dataclasses.replace(BASE, depth=8), "muon", "bf16"),
    "wide, AdamW": (dataclasses.replace(BASE, width=512, n_heads=8, d_ff=1376, depth=2), "adamw", "fp32"),
    "grouped heads, tied": (dataclasses.replace(BASE, n_kv_heads=1, tied_embeddings=True), "adamw", "fp32"),
    "no QK-norm, large vocabulary": (dataclasses.replace(BASE, qk_norm=False, vocab_size=16384), "adamw", "fp32"),
    "experts": (dataclasses.replace(BASE, experts=Experts(8, 2, n_shared=1, granularity=2)), "muon", "fp32"),
}
RECOMPUTE = ("none", "selective", "full")
STEPS = 2
"""Steps measured: gloo's own thread may be the last to let go of a buffer, which is then missing from that step's account."""


def peak_bytes(shape: ModelShape, tokens: int, optimizer: str, precision: str, recompute: str) -> int:
    """Most bytes that tensors take in the second step of a run of one micro-batch a step, in one process."""
    torch.manual_seed(0)
    model = Decoder(shape, precision)
    model.initialise(0)
    set_up(model, "none", recompute)  # type: ignore[arg-type]
    optimizers = Optimizers(model, OptimSpec(optimizer, 1e-3), precision)  # type: ignore[arg-type]
    ids = torch.randint(0, shape.vocab_size, (tokens // shape.seq_len, shape.seq_len))

    def step() -> None:
        (model.loss(ids, ids) / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step(1.0)

    return _peak(step, lambda: [*model.parameters(), *model.buffers(), *_states(optimizers)])


def sharded_peak_bytes(
    shape: ModelShape, tokens: int, optimizer: str, precision: str, recompute: str, world: World
) -> int:
    """The same of this rank, of as many shards as there are ranks; `tokens` are those of one rank."""
    spec = RunSpec(
        shape=shape,
        data=DataSpec("stdlib"),
        tokens=2 * tokens * world.size,
        batch_tokens=tokens * world.size,
        optim=OptimSpec(optimizer, 1e-3),  # type: ignore[arg-type]
        schedule=ScheduleSpec("wsd", 0),
        eval=EvalSpec(1),
        precision=precision,  # type: ignore[arg-type]
    )
    model: ParallelModel = parallel_model(spec, "", tokens, recompute, world, torch.device("cpu"))  # type: ignore[arg-type]
    optimizers = Optimizers(model, spec.optim, precision, model.mesh)
    ids = torch.randint(0, shape.vocab_size, (tokens // shape.seq_len, shape.seq_len))

    def step() -> None:
        model.gradients(ids, ids, 1.0)
        optimizers.step(1.0)

    buffers = [buffer for stage in model.stages for buffer in stage.buffers()]
    return _peak(step, lambda: [*(p for _, p in model.named_parameters()), *buffers, *_states(optimizers)])


def _states(optimizers: Optimizers) -> Iterator[Tensor]:
    for state in optimizers.adamw.state.values():
        yield from state.values()
    if optimizers.muon:
        yield from optimizers.muon.moments()


def _peak(step: Callable[[], None], held: Callable[[], Iterable[Tensor]]) -> int:
    """Most bytes in a later step: what is held before it, and the most that it has allocated at a time."""
    step()
    gc.collect()
    before = sum(local_part(tensor).nbytes for tensor in held())
    return before + max(_allocated(step) for _ in range(STEPS))


def _allocated(step: Callable[[], None]) -> int:
    """The most bytes that a step has allocated at a time, of blocks that this thread saw freed too: none outlives a step."""
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    assert profile.profiler is not None
    roots = profile.profiler.kineto_results.experimental_event_tree()
    found = [e for e in traverse_dfs(roots) if e.tag == torch._C._profiler._EventType.Allocation]
    found.sort(key=lambda e: e.start_time_ns)
    changes = []
    begun: dict[int, int] = {}
    for number, fields in enumerate(e.typed[1] for e in found):
        changes.append(fields.alloc_size)
        if fields.alloc_size > 0:
            if fields.ptr in begun:  # the block's end was not seen
                changes[begun[fields.ptr]] = 0
            begun[fields.ptr] = number
        elif begun.pop(fields.ptr, None) is None:  # of before the step
            changes[-1] = 0
    for number in begun.values():
        changes[number] = 0
    return max(accumulate(changes))


def measure(cases: list[str], tokens: int, shards: int) -> list[int]:
    """The fullest rank's peak of each case with each recomputation, in turn."""
    asked = [(*CASES[name], recompute) for name in cases for recompute in RECOMPUTE]
    if shards == 1:
        return [peak_bytes(shape, tokens, *how) for shape, *how in asked]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peaks.json"
        rank = [sys.executable, __file__, "--tokens", str(tokens), "--rank-of", str(out), "--cases", *cases]
        if run_ranks(rank, shards) != 0:
            sys.exit(f"{shards} ranks failed")
        found: list[int] = json.loads(out.read_text())
        return found


def work_as_rank(cases: list[str], tokens: int, out: Path) -> None:
    """One rank's part of `measure`; rank 0 writes what it came to."""
    world = find_world()
    assert world is not None
    join(world, "cpu")
    peaks = []
    for name in cases:
        shape, *how = CASES[name]
        for recompute in RECOMPUTE:
            peaks.append(max(world.collect(sharded_peak_bytes(shape, tokens, *how, recompute, world))))
            gc.collect()
        if world.leads:
            out.write_text(json.dumps(peaks))
    leave()


def main(argv: list[str]) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of a rank's micro-batch (default 2048)")
    parser.add_argument(
        "--shards", type=int, nargs="+", default=[1, 2], help="ranks of each measurement (default 1 2)"
    )
    parser.add_argument("--quick", action="store_true", help="the first shape alone")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="the shapes (default all)")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    cases = args.cases[: 1 if args.quick else None]
    if args.rank_of:
        work_as_rank(cases, args.tokens, args.rank_of)
        return
    print("| shape | shards | recompute | measured MB | predicted MB | ratio |\n|---|---|---|---|---|---|")
    worst = 1.0
    for shards in args.shards:
        asked = [(name, recompute) for name in cases for recompute in RECOMPUTE]
        for (name, recompute), measured in zip(asked, measure(cases, args.tokens, shards), strict=True):
            shape, *how = CASES[name]
            predicted = training_bytes(shape, args.tokens, *how, recompute, shards=shards).total
            ratio = predicted / measured
            worst = max(worst, ratio, 1 / ratio)
            row = f"{measured / 1e6:.1f} | {predicted / 1e6:.1f} | {ratio:.3f}"
            print(f"| {name} | {shards} | {recompute} | {row} |", flush=True)
    print(f"\nworst: {100 * (worst - 1):.1f}% off")


if __name__ == "__main__":
    run_command(main)
