"""A real sweep, the sealed forecast of a run 30 times larger, and that run: `python bench/gpu.py --sweep DIR`.

16 runs at four budgets a factor of 3 apart, each at four sizes about 20 tokens a parameter; then the forecast of 30 times the
largest, the run itself and the postmortem, all by the project's own commands. The same command goes on where it was stopped.
By estimate an H200 is through in about 10 minutes at the default of 1e15 FLOPs for the largest run (flagship 3e16); 3e15 has a
flagship of 9e16; at 1e17 the flagship's 3e18 alone are hours. The text is what is installed, read up to 8 times over.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scaling import compose
from scaling.accounting import count_params, flops_per_token
from scaling.demo import Step, summary
from scaling.errors import InputError
from scaling.grid import run_settings
from scaling.shape import ShapeFamily
from scaling.sweepdir import RunDir, check_writable
from scaling.text import readable_time

ROOT = Path(__file__).resolve().parents[1]
EXTRAPOLATION = 30.0
"""Compute of the forecast run over that of the largest run of the sweep."""
BUDGETS = (1 / 27, 1 / 9, 1 / 3, 1.0)
"""Over the largest run's."""
TOKENS_PER_PARAM = (5.0, 12.0, 30.0, 80.0)
"""D/N aimed at, at each budget; the widths that there are decide."""
LARGEST_FLOPS = {"cuda": 1e15, "cpu": 1e10}
SETTINGS = {
    "cuda": (
        *("model=demo", "model.depth=6", "model.n_heads=null", "model.head_dim=16", "model.width_multiple=16"),
        *("model.ff_multiple=16", "model.seq_len=512", "model.vocab_size=4096", "precision=bf16", "hardware=h200"),
        *("recipe.batch_multiplier=2", "data=site", "data.max_epochs=8", "eval.tokens=1048576"),
    ),
    "cpu": ("model=demo", "model.depth=2", "data=stdlib", "eval.tokens=16384", "eval.points=3"),
}
LAUNCHER = {
    "cuda": (
        *("launcher.device=cuda", "launcher.compile=block", "launcher.cuda_graphs=true"),
        *("launcher.micro_batch_tokens=65536", "launcher.checkpoint_every_s=60"),
    ),
    "cpu": (),
}
OF_SWEEP = {"cuda": ("launcher.share=processes", "launcher.share_runs=8"), "cpu": ()}
OF_FLAGSHIP = {"cuda": (), "cpu": ("run.threads=1",)}


def nearest_widths(family: ShapeFamily, budget_flops: float) -> list[int]:
    """Different widths whose runs of this budget come nearest to TOKENS_PER_PARAM, N of body and head."""
    step = math.lcm(family.width_multiple, family.head_dim or family.n_heads or 1)
    ratios: dict[int, float] = {}
    width = step
    while len(ratios) < len(TOKENS_PER_PARAM) or ratios[width - step] > TOKENS_PER_PARAM[0] / 4:
        shape = family.shape(width)
        tokens = budget_flops / flops_per_token(shape).train
        ratios[width] = tokens / count_params(shape).active("body_head")
        width += step
    chosen: list[int] = []
    for wanted in TOKENS_PER_PARAM:
        left = [w for w in ratios if w not in chosen]
        chosen.append(min(left, key=lambda w: abs(math.log(ratios[w] / wanted))))
    return sorted(chosen)


def commands(out: Path, device: str, largest: float, settings: Sequence[str]) -> list[Step]:
    """Sweep, fit, flagship, postmortem."""
    family = run_settings(compose.load("sweep", settings)).family
    points = []
    for share in BUDGETS:
        widths = nearest_widths(family, share * largest)
        points.append([f"flops={share * largest:.4g}", f"model.width={','.join(map(str, widths))}"])
    sweep = ["scaling.sweep", "+grid=isoflop", f"grid.points={json.dumps(points)}", f"sweep.dir={out / 'sweep'}"]
    sweep += [*settings, *LAUNCHER[device], *OF_SWEEP[device]]
    table, forecast, flagship = out / "sweep" / "runs.csv", out / "forecast.json", out / "flagship"
    fit = [
        "analysis.fit",
        "--data",
        str(out / "sweep"),
        "--budget",
        f"{EXTRAPOLATION * largest:g}",
        "--out",
        str(out),
    ]
    train = ["train.flagship", f"forecast={forecast}", f"run.dir={flagship}", *LAUNCHER[device], *OF_FLAGSHIP[device]]
    postmortem = ["analysis.postmortem", str(flagship), "--forecast", str(forecast), "--out", str(out)]
    record = flagship / "record.json"
    return [
        Step(sweep),
        Step(fit, (table,), (forecast,)),
        Step(train, (forecast,), (record,)),
        Step(postmortem, (forecast, record), (out / "postmortem.json",)),
    ]


def sweep(out: Path, device: str, largest: float | None, settings: Sequence[str]) -> int:
    """Run the commands that are not through yet; the forecast against the fact last. Returns the exit status."""
    largest = LARGEST_FLOPS[device] if largest is None else largest
    if not 0 < largest < float("inf"):
        raise InputError(f"--largest {largest:g}: must be positive FLOPs")
    out = out.resolve()
    steps = commands(out, device, largest, [*SETTINGS[device], *settings])
    check_writable(out)
    started = time.monotonic()
    for step in steps:
        print(f"\n$ python -m {' '.join(step.command)}", flush=True)
        if step.is_through():
            print("(done before)", flush=True)
            continue
        began = time.monotonic()
        status = subprocess.run([sys.executable, "-m", *step.command], cwd=ROOT).returncode
        print(f"({readable_time(time.monotonic() - began)})", flush=True)
        if status:
            return status if status > 0 else 1
    record = RunDir(out / "flagship").record()
    assert record is not None
    print(f"\n{summary(out)}")
    print(f"{'flagship':<14} {record.tokens_per_s:,.0f} tokens/s, {record.epochs:.2f} epochs of its text")
    print(f"{'time':<14} {readable_time(time.monotonic() - started)}")
    return 0
