"""A sweep as the planner and the engine leave it, with losses of a known surface."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from scaling.accounting import training_flops
from scaling.grid import make_run
from scaling.recipe import recipe_from_dict
from scaling.records import DataManifest, Plan, RunRecord
from scaling.shape import Experts, ShapeFamily
from scaling.spec import DataSpec, EvalSpec, OptimSpec, RunSpec, ScheduleSpec
from scaling.sweepdir import RunDir, SweepDir

FAMILY = ShapeFamily(vocab_size=512, seq_len=128, depth=4, n_heads=4)
GRID = [
    *((1e11, w, 0) for w in (16, 24, 32)),
    *((2.2e11, w, 0) for w in (16, 24, 32, 40)),
    *((4.6e11, w, 0) for w in (24, 32, 40, 48)),
    *((1e12, w, 0) for w in (32, 40, 48, 56)),
    *((1e11, 24, s) for s in (1, 2)),
    *((4.6e11, 40, s) for s in (1, 2)),
]
"""(FLOPs, width, seed)."""
SURFACE = {"E": 1.0, "A": 60.0, "B": 100.0, "alpha": 0.32, "beta": 0.30}
MANIFEST = DataManifest("site", "0123456789abcdef", 512, 45_000_000, 500_000, 9 * 10**7, 10**6, 9000, 90, 10, 0)


def plan_run(flops: float, width: int, seed: int, family: ShapeFamily = FAMILY) -> RunSpec:
    """A run of the demo's kind."""
    return make_run(
        family,
        width,
        flops=flops,
        recipe=recipe_from_dict({"name": "steplaw"}),
        data=DataSpec("site", digest=MANIFEST.digest),
        optim=OptimSpec("muon", peak_lr=1e-3),
        schedule=ScheduleSpec("wsd", warmup_tokens=0),
        eval=EvalSpec(tokens=65536, points=8),
        seed=seed,
    )


def write_record(run: RunDir, spec: RunSpec, loss: float | None, status: str = "ok") -> None:
    """record.json and metrics.jsonl of a finished run whose loss falls as (fraction)^−0.2 to its final value."""
    run.create(spec)
    params = {c: spec.params.count(c) for c in ("total", "non_embedding", "body_head")}
    flops = {c: training_flops(spec.shape, spec.tokens, c) for c in ("exact", "full_attention", "6nd")}
    RunRecord(
        spec.run_id, status, spec, params, spec.tokens, flops, loss, None, None, 0.1, 1.0, 1.0, 1.0, None, 1,
        "cpu", 1, {}, None, None if status == "ok" else "loss above 2 × its minimum",
    ).write_once(run.record_json)  # fmt: skip
    if loss is not None:
        points = spec.eval.points
        rows = [
            {"step": k, "tokens": spec.tokens * k // points, "val_loss": loss * (k / points) ** -0.2}
            for k in range(1, points + 1)
        ]
        run.metrics_jsonl.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def make_sweep(tmp_path: Path) -> Callable[..., Path]:
    """make_sweep(noise=…, surface=…, name=…, experts=…, precision=…) → a finished sweep directory."""

    def make(
        noise: float = 0.002,
        surface: dict[str, float] = SURFACE,
        name: str = "sweep",
        seed: int = 0,
        experts: Experts | None = None,
        precision: str = "fp32",
    ) -> Path:
        rng = np.random.default_rng(seed)
        sweep = SweepDir(tmp_path / name)
        family = replace(FAMILY, experts=experts)
        specs = [replace(plan_run(*cell, family), precision=precision) for cell in GRID]
        Plan(
            name, "demo", ["+grid=demo"], "2026-01-01T00:00:00Z", None, family, {"name": "steplaw"}, MANIFEST, specs
        ).write(sweep.plan_json)
        for spec in specs:
            n, d = spec.params.body_head, spec.tokens
            loss = surface["E"] + surface["A"] * n ** -surface["alpha"] + surface["B"] * d ** -surface["beta"]
            write_record(sweep.run(spec.run_id), spec, float(loss * np.exp(noise * rng.standard_normal())))
        return sweep.path

    return make


@pytest.fixture
def golden() -> Path:
    """../shared/golden, published runs that the repository does not contain."""
    path = Path(__file__).resolve().parents[3] / "shared" / "golden"
    if not path.is_dir():
        pytest.skip(f"golden data are not at {path}")
    return path
