"""A demo in a folder, made without training: a sweep whose losses lie on a known surface, its sealed forecast, a flagship."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from analysis.decide import make_forecast, write_forecast
from analysis.inference import FitResult, fit_law
from analysis.runs import Runs, load_runs
from scaling.accounting import PARAMS_CONVENTIONS
from scaling.config import to_dict
from scaling.grid import make_run
from scaling.recipe import Recipe
from scaling.records import DataManifest, Forecast, Plan, RunRecord
from scaling.shape import ShapeFamily
from scaling.spec import DataSpec, EvalSpec, OptimSpec, RunSpec, ScheduleSpec
from scaling.sweepdir import RunDir, SweepDir

FAMILY = ShapeFamily(vocab_size=512, seq_len=128, depth=4, head_dim=8)
CELLS = {1e11: (16, 24, 32), 2e11: (16, 24, 32), 4e11: (16, 24, 32, 40), 1e12: (24, 32, 40, 48)}
REPLICATED = ((1e11, 24), (4e11, 32))
BUDGET = 1e13


def true_loss(spec: RunSpec, noise: float = 0.0) -> float:
    n, d = spec.params.body_head, spec.tokens
    return float((1.2 + 28 / n**0.28 + 150 / d**0.3) * np.exp(noise))


def record_of(spec: RunSpec, loss: float) -> RunRecord:
    params = {name: spec.params.count(name) for name in PARAMS_CONVENTIONS}
    return RunRecord(
        run_id=spec.run_id,
        status="ok",
        spec=spec,
        params=params,
        tokens=spec.tokens,
        flops={"exact": spec.flops, "full_attention": spec.flops, "6nd": 6.0 * params["body_head"] * spec.tokens},
        loss=loss,
        bits_per_byte=loss / 2,
        train_loss=loss,
        epochs=0.1,
        wall_s=1.0,
        train_s=1.0,
        tokens_per_s=float(spec.tokens),
        mfu=None,
        attempts=1,
        device="cpu",
        threads=1,
        versions={"python": "3.11"},
        commit=None,
    )


def write_run(folder: RunDir, spec: RunSpec, loss: float) -> RunRecord:
    """A finished run's folder: spec, metrics with ten evaluations, record."""
    folder.create(spec)
    fractions = np.linspace(0.1, 1, 10)
    rows = [
        {
            "step": round(f * spec.steps),
            "tokens": round(f * spec.steps) * spec.batch_tokens,
            "train_loss": loss,
            "val_loss": loss * float(f**-0.15 if f < 1 else 1.0),
        }
        for f in fractions
    ]
    folder.metrics_jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = record_of(spec, loss)
    folder.record_json.unlink(missing_ok=True)
    record.write_once(folder.record_json)
    return record


@dataclass(frozen=True)
class Demo:
    path: Path
    runs: Runs
    fit: FitResult
    forecast: Forecast
    flagship: RunRecord

    @property
    def flagship_dir(self) -> Path:
        return self.path / "flagship"


def make_sweep(path: Path) -> None:
    manifest = DataManifest("site", "ab" * 8, 512, 45_000_000, 10**6, 10**8, 10**6, 1000, 10, 5, 0)
    recipe = Recipe(name="steplaw")

    def run(flops: float, width: int, seed: int) -> RunSpec:
        return make_run(
            FAMILY,
            width,
            flops=flops,
            recipe=recipe,
            data=DataSpec("site", digest=manifest.digest),
            optim=OptimSpec("muon", 1e-3),
            schedule=ScheduleSpec("wsd", 0),
            eval=EvalSpec(65536),
            seed=seed,
        )

    specs = [run(flops, width, 0) for flops, widths in CELLS.items() for width in widths]
    specs += [run(flops, width, seed) for flops, width in REPLICATED for seed in (1, 2)]
    plan = Plan(
        "sweep", "demo", ["+grid=demo"], "2026-01-01T00:00:00Z", "abc", FAMILY, to_dict(recipe), manifest, specs
    )
    sweep = SweepDir(path)
    plan.write(sweep.plan_json)
    noise = np.random.default_rng(0).normal(0, 0.003, len(specs))
    for spec, deviation in zip(specs, noise, strict=True):
        write_run(sweep.run(spec.run_id), spec, true_loss(spec, deviation))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Not to be changed by tests; `demo_copy` may be."""
    path = tmp_path_factory.mktemp("demo")
    make_sweep(path / "sweep")
    runs = load_runs(path / "sweep")
    fit = fit_law(runs, draws=200)
    forecast = dataclasses.replace(make_forecast(fit, runs, BUDGET), sweep="sweep", seal="")
    forecast = dataclasses.replace(forecast, seal=forecast.computed_seal())
    write_forecast(path / "forecast.json", forecast)
    flagship = write_run(RunDir(path / "flagship"), forecast.spec, true_loss(forecast.spec, 0.002))
    return Demo(path, runs, fit, forecast, flagship)
