"""The number of experts: the law's best within the bounds, at the runs' own D/N, and what a fit cannot tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.decide.experts import ExpertsChoice, choose_experts
from analysis.fit import main
from analysis.inference import fit_law
from analysis.laws.surface import get_law
from analysis.runs import load_runs
from scaling.accounting import count_params, flops_per_token
from scaling.errors import InputError
from scaling.grid import make_run
from scaling.recipe import recipe_from_dict
from scaling.records import Plan
from scaling.shape import Experts
from scaling.spec import DataSpec, EvalSpec, OptimSpec, ScheduleSpec
from scaling.sweepdir import SweepDir

from .conftest import FAMILY, MANIFEST, write_record

SPARSE = Experts(n_experts=8, top_k=1, n_shared=1, granularity=2)
TRUTH = {"a": -0.083, "b": -0.126, "c": 0.012, "d": 1.0, "E_start": 1.5, "E_max": 300.0}
"""Clark et al. 2022 near their values: the law experts."""
COUNTS = (1, 4, 8, 16, 32)


def family(count: int):
    return replace(FAMILY, experts=None if count == 1 else replace(SPARSE, n_experts=count))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Finished runs of three widths and five numbers of experts at D/N = 12, with losses of TRUTH."""
    path = SweepDir(tmp_path / "experts")
    specs = [
        make_run(
            family(count), width, tokens_per_param=12, recipe=recipe_from_dict({"name": "steplaw"}),
            data=DataSpec("site", digest=MANIFEST.digest), optim=OptimSpec("muon", peak_lr=1e-3),
            schedule=ScheduleSpec("wsd", warmup_tokens=0), eval=EvalSpec(tokens=65536, points=4),
        )
        for count in COUNTS for width in (32, 64, 96)
    ]  # fmt: skip
    plan = Plan("e", "e", [], "2026-01-01T00:00:00Z", None, FAMILY, {"name": "steplaw"}, MANIFEST, specs)
    plan.write(path.plan_json)
    rng = np.random.default_rng(0)
    for spec in specs:
        count = spec.shape.experts.n_experts if spec.shape.experts else 1
        loss = get_law("experts").predict(TRUTH, active_params=spec.params.active("body_head"), experts=count)
        write_record(path.run(spec.run_id), spec, float(loss) * float(np.exp(0.001 * rng.standard_normal())))
    return path.path


def chosen(path: Path, counts: tuple[int, ...], **bounds: float) -> ExpertsChoice:
    runs = load_runs(path)
    return choose_experts(fit_law(runs, "experts", draws=50), runs, 1e13, counts, **bounds)


def test_more_experts_are_better_until_memory_ends(sweep: Path) -> None:
    free = chosen(sweep, (*COUNTS, 64))
    assert free.best == 64
    assert [c.experts for c in free.candidates if not c.measured] == [64]
    assert free.share > 0.9
    losses = [c.loss for c in free.candidates]
    assert losses == sorted(losses, reverse=True)
    by_count = {c.experts: c for c in free.candidates}
    capped = chosen(sweep, COUNTS, max_total=1.01 * by_count[8].n_total)
    assert capped.best == 8
    assert [c.fits for c in capped.candidates] == [True, True, True, False, False]
    assert chosen(sweep, COUNTS, max_total=1e3).best is None


def test_a_candidate_spends_the_budget_at_the_runs_ratio_and_has_the_laws_loss(sweep: Path) -> None:
    choice = chosen(sweep, (1, 8))
    assert choice.tokens_per_param == pytest.approx(12, rel=0.02)
    for c in choice.candidates:
        assert c.n_tokens == pytest.approx(choice.tokens_per_param * c.n_active)
        truth = float(get_law("experts").predict(TRUTH, active_params=c.n_active, experts=c.experts))
        assert c.loss == pytest.approx(truth, rel=0.01)
        sizes = [family(c.experts).shape(width) for width in range(16, 512, 8)]
        near = min(sizes, key=lambda s: abs(count_params(s).active("body_head") - c.n_active))
        counted = count_params(near)
        assert flops_per_token(near).train * c.n_tokens == pytest.approx(1e13, rel=0.15)
        assert counted.total / counted.active("body_head") == pytest.approx(c.n_total / c.n_active, rel=0.05)


def test_the_command_answers_and_says_what_it_cannot_tell(
    sweep: Path, make_sweep: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--draws", "20", "--budget", "1e13", "--experts"]
    main(["--data", str(sweep), "--law", "experts", "--json", "-", *argv, "auto", "64"])
    (said,) = json.loads(capsys.readouterr().out)["experts"]
    assert [c["experts"] for c in said["candidates"]] == [*COUNTS, 64]
    main(["--data", str(sweep), "--law", "experts", "--serve-memory-gb", "0.01", *argv, "auto"])
    text = capsys.readouterr().out
    assert "how many experts" in text
    assert "does not fit" in text
    main(["--data", str(make_sweep()), "--law", "chinchilla", *argv, "4", "8"])
    assert "this fit cannot tell" in capsys.readouterr().out
    with pytest.raises(InputError, match="whole numbers"):
        main(["--data", str(sweep), *argv, "many"])


def test_runs_that_the_law_does_not_hold_for_are_refused(sweep: Path, make_sweep: Callable[..., Path]) -> None:
    runs = load_runs(sweep)
    fit = fit_law(runs, "experts", draws=5)
    with pytest.raises(InputError, match="no sweep with experts"):
        choose_experts(fit, load_runs(make_sweep()), 1e13, COUNTS)
    spread = replace(runs, table=runs.table.assign(n_tokens=runs.table["n_tokens"] * np.linspace(1, 4, len(runs))))
    with pytest.raises(InputError, match="one such ratio"):
        choose_experts(fit, spread, 1e13, COUNTS)
    with pytest.raises(InputError, match="smallest shape"):
        choose_experts(fit, runs, 1e3, COUNTS)
    with pytest.raises(InputError, match="n_experts"):
        choose_experts(fit, runs, 1e13, (8, 0))
