"""What a row of bench/gpu.py measures: the engine's own steps on random tokens."""

from __future__ import annotations

import dataclasses
import gc
import gzip
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_rows import WAIT_S, Job, Measured

from scaling.errors import InputError
from scaling.records import DataManifest
from scaling.shape import ModelShape
from train.data.loader import Corpus
from train.engine.auto import attention_on
from train.engine.host import Host
from train.engine.profiler import WARMUP_STEPS, profiled
from train.engine.stacked import Member, together
from train.engine.trainer import Trainer
from train.model.decoder import Decoder

WARMUP = 3
"""Steps before the clock starts: compilation, capture, the allocator."""
PROFILED_STEPS = 3

FAMILIES = {
    "attention": r"flash|fmha|attention|cudnn.*sdpa",
    "optimizer and clipping": r"adam|multi_tensor|foreach|vector_norm",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|aten::(mm|bmm|addmm|addmm_|_scaled_mm)\b",
    "compiled": r"triton",
    "embedding and gather": r"embedding|index|gather|scatter",
    "copies and casts": r"copy|memcpy|memset|fill|zero|cat\b|catarray",
    "norms, softmax, sums": r"reduce|norm|softmax|sum|amax|logsumexp",
    "element-wise": r"elementwise|vectorized|aten::(add|mul|div|sub|neg|exp|silu|rsqrt|pow)",
}
"""Kernel families by their names, the first that fits: CUDA kernels, or ATen's operators on a CPU."""


def host_of(job: Job, device: str) -> Host:
    """Where a job runs."""
    return Host(device, micro_batch_tokens=job.pass_tokens, compile=job.compile, cuda_graphs=job.cuda_graphs)


def synchronise(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_corpus(shape: ModelShape, n_tokens: int) -> Corpus:
    """Random tokens in memory."""
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, n_tokens, np.uint16)
    manifest = DataManifest("stdlib", "0" * 16, shape.vocab_size, n_tokens, n_tokens, n_tokens, n_tokens, 1, 1, 0, 0)
    ends = np.array([n_tokens], np.uint64)
    return Corpus(Path(), manifest, tokens, tokens, ends, ends)


def free(device: torch.device) -> None:
    """Give back the memory of what is no longer used, compiled code too."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(job: Job, device: str, meet: Callable[[], object]) -> Measured:
    """Time a job's steps in this process.

    Args:
        meet: waits until every process of the job is there.
    """
    where = torch.device(device)
    free(where)  # what a row that failed still held
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
    corpus = random_corpus(job.shape, max(8 * job.batch_tokens, 4 * job.shape.seq_len))
    try:
        found = _stacked(job, device, corpus, meet) if job.stacked > 1 else _single(job, device, corpus, meet)
        peak = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else 0
        return dataclasses.replace(found, peak_bytes=peak)
    finally:
        free(where)


def _drive(trainer: Trainer, steps: int) -> None:
    """The loop's own steps, from where the run is."""
    step = trainer.progress.step
    for batch in trainer.loader.iterate(step, step + steps):
        trainer.step(*batch)
    synchronise(trainer.device)


def _single(job: Job, device: str, corpus: Corpus, meet: Callable[[], object]) -> Measured:
    trainer = Trainer(job.spec(), corpus, host_of(job, device))
    _drive(trainer, WARMUP)
    meet()
    began = time.monotonic()
    _drive(trainer, job.steps)
    ended = time.monotonic()
    meet()
    families, busy = _families(trainer) if job.families else ({}, 0.0)
    parts = _parts(trainer, min(job.steps, 10)) if job.processes == 1 else {}
    return Measured(began, ended, job.steps * job.batch_tokens, 0, parts, families, busy)


def _stacked(job: Job, device: str, corpus: Corpus, meet: Callable[[], object]) -> Measured:
    line = threading.Barrier(job.stacked, timeout=WAIT_S)
    raised: list[Exception] = []

    def work(member: Member) -> tuple[float, float]:
        try:
            seed = member.number
            trainer = Trainer(job.spec(seed), corpus, dataclasses.replace(host_of(job, device), member=member))
            _drive(trainer, WARMUP)
            line.wait()
            began = time.monotonic()
            _drive(trainer, job.steps)
            return began, time.monotonic()
        except Exception as error:
            raised.append(error)
            line.abort()
            raise

    meet()
    try:
        times = together([work] * job.stacked)
    except threading.BrokenBarrierError:
        raise raised[0] from None
    began, ended = min(start for start, _ in times), max(end for _, end in times)
    return Measured(began, ended, job.stacked * job.steps * job.batch_tokens, 0)


def _parts(trainer: Trainer, steps: int) -> dict[str, float]:
    """Mean seconds of a step's parts, each waited for; forward and backward are one where they are captured."""
    parts: dict[str, float] = {}
    started = time.perf_counter()

    def mark(name: str) -> None:
        nonlocal started
        synchronise(trainer.device)
        now = time.perf_counter()
        parts[name] = parts.get(name, 0.0) + (now - started) / steps
        started = now

    assert isinstance(trainer.model, Decoder)
    micro = trainer.host.micro_batch_tokens // trainer.spec.shape.seq_len
    clip = trainer.spec.optim.clip_norm
    for inputs_BT, targets_BT in trainer.loader.iterate(0, steps):
        batches = [
            (x.to(trainer.device), y.to(trainer.device))
            for x, y in zip(inputs_BT.split(micro), targets_BT.split(micro), strict=True)
        ]
        mark("data")
        if trainer.captured is not None:
            trainer.captured.clear_gradients()
        for inputs, targets in batches:
            if trainer.captured is not None:
                trainer.captured(inputs, targets)
                mark("forward and backward")
                continue
            loss = trainer.model.loss(inputs, targets) / trainer.spec.batch_tokens
            mark("forward")
            loss.backward()
            mark("backward")
        torch.nn.utils.clip_grad_norm_(trainer.parameters, clip)
        mark("clip")
        trainer.optimizers.step(1.0)
        mark("update")
    return parts


def _families(trainer: Trainer) -> tuple[dict[str, float], float]:
    """Seconds of a step by kernel family, by the engine's profiler, and the share of the time that a kernel ran in."""
    first = trainer.progress.step
    with tempfile.TemporaryDirectory() as folder:
        batches = trainer.loader.iterate(first, first + WARMUP_STEPS + PROFILED_STEPS)
        for batch in profiled(batches, PROFILED_STEPS, Path(folder)):
            trainer.step(*batch)
            synchronise(trainer.device)
        with gzip.open(Path(folder) / "profile" / "trace.json.gz", "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    return kernel_families(events, PROFILED_STEPS)


def kernel_families(events: Sequence[dict[str, Any]], steps: int) -> tuple[dict[str, float], float]:
    """Seconds of a step by kernel family, the longest first, of a profiler's trace; and the share of time in kernels.

    Where no kernel of a GPU is among the events, the time that CPU operators spend in themselves.
    """
    on_gpu = ("kernel", "gpu_memcpy", "gpu_memset")
    timed = [(e["name"], e["ts"], e["dur"], e["tid"]) for e in events if e.get("cat") in on_gpu]
    spent = [(name, float(length)) for name, _, length, _ in timed]
    if not timed:
        timed = [(e["name"], e["ts"], e["dur"], e["tid"]) for e in events if e.get("cat") == "cpu_op"]
        spent = list(_own_times(timed))
    families: dict[str, float] = {}
    for name, length in spent:
        fits = (family for family, names in FAMILIES.items() if re.search(names, name.lower()))
        family = next(fits, "other")
        families[family] = families.get(family, 0.0) + length / 1e6 / steps
    window = max(t + length for _, t, length, _ in timed) - min(t for _, t, _, _ in timed) if timed else 0.0
    busy = sum(length for _, length in spent) / window if window else 0.0
    return dict(sorted(families.items(), key=lambda item: -item[1])), busy


def _own_times(timed: Sequence[tuple[str, float, float, int]]) -> Iterator[tuple[str, float]]:
    """Of nested events, the time of each without that of those inside it."""
    for thread in {tid for *_, tid in timed}:
        open_: list[tuple[str, float, float]] = []  # name, end, own time so far
        mine = sorted((e for e in timed if e[3] == thread), key=lambda e: (e[1], -e[2]))
        for name, start, length, _ in mine:
            while open_ and open_[-1][1] <= start:
                yield open_[-1][0], open_.pop()[2]
            if open_:
                outer, end, own = open_[-1]
                open_[-1] = outer, end, own - length
            open_.append((name, start + length, length))
        yield from ((name, own) for name, _, own in open_)


def matmul_flops(dtype: str, size: int, device: str) -> float:
    """FLOP/s of a square product of random numbers, in bf16, or in fp8 as train.model.fp8 has it."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    if dtype == "fp8":
        one = torch.ones((), device=device)
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()

        def product() -> torch.Tensor:
            return torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=False)
    else:

        def product() -> torch.Tensor:
            return a @ b

    repeats = 20 if device == "cuda" else 3
    for _ in range(2):
        product()
    synchronise(torch.device(device))
    start = time.perf_counter()
    for _ in range(repeats):
        product()
    synchronise(torch.device(device))
    return 2 * size**3 * repeats / (time.perf_counter() - start)


def device_name(device: str) -> str:
    """As the driver says it.

    Raises:
        InputError: there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("this machine has no GPU: give --device cpu for the same code on small shapes")
    return torch.cuda.get_device_name() if device == "cuda" else device


def attention(device: str) -> str:
    """The kernels that attention takes in bf16, and why."""
    return ": ".join(attention_on(torch.device(device), Host().attention, torch.bfloat16))


def explain(error: Exception) -> str:
    """One line for a table's cell."""
    text = " ".join(str(error).split()).replace("|", "/")
    if isinstance(error, InputError):
        return text
    kind = "out of memory" if isinstance(error, (torch.OutOfMemoryError, MemoryError)) else type(error).__name__
    return f"{kind}: {text[:160]}"


CALLS: dict[str, Callable[..., Any]] = {
    "measure": measure,
    "matmul": matmul_flops,
    "name": device_name,
    "attention": attention,
}
