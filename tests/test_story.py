"""The whole story through the commands that a user types, on a corpus of a few files: then once more, and nothing moves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling.records import Forecast
from scaling.sweepdir import RunDir, SweepDir

ROOT = Path(__file__).resolve().parents[1]
TEXT = Path(sysconfig.get_paths()["stdlib"]) / "[a-d]*.py"
BUDGET = 2e10
SWEEP = [
    "model=smoke", "model.vocab_size=300", "data=text", f"data.path='{TEXT}'", "flops=3e8,1e9,3e9",
    "model.width=8,12,16", "seed=0", "eval.tokens=4096", "eval.points=2",
    "launcher.workers=2",
]  # fmt: skip

pytestmark = pytest.mark.slow
Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the story goes."""
    return tmp_path_factory.mktemp("story")


@pytest.fixture(scope="module")
def command(out: Path) -> Command:
    """Run `python -m MODULE ARGS`."""
    environment = {**os.environ, "ISOFLOP_CACHE": str(out / "cache"), "OMP_NUM_THREADS": "1"}

    def run(module: str, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *args],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=400,
        )

    return run


def story(out: Path) -> list[list[str]]:
    """The four commands."""
    forecast = out / "forecast.json"
    return [
        ["scaling.sweep", *SWEEP, f"sweep.dir={out / 'sweep'}"],
        ["analysis.fit", "--data", str(out / "sweep"), "--budget", f"{BUDGET:g}", "--out", str(out)],
        ["train.flagship", f"forecast={forecast}", f"run.dir={out / 'flagship'}", "run.threads=1"],
        ["analysis.postmortem", str(out / "flagship"), "--forecast", str(forecast), "--out", str(out)],
    ]


@pytest.fixture(scope="module")
def told(out: Path, command: Command) -> Path:
    """The folder, after the story was told once."""
    for words in story(out):
        done = command(*words)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
    return out


def kept(out: Path) -> dict[str, tuple[int, bytes]]:
    """What a second telling must not touch: plan, records, specs, the sealed forecasts, the trained models."""
    patterns = ("**/record.json", "**/spec.json", "**/forecast.json", "sweep/plan.json", "**/checkpoints/*.pt")
    paths = [path for pattern in patterns for path in out.glob(pattern)]
    return {str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def test_the_artefacts(told: Path) -> None:
    sweep = SweepDir(told / "sweep")
    assert [record.status for record in sweep.records()] == ["ok"] * 9
    forecast = Forecast.read(told / "forecast.json")
    assert forecast.seal == forecast.computed_seal()
    assert sorted(forecast.run_ids) == sorted(record.run_id for record in sweep.records())
    assert forecast.spec.flops == pytest.approx(BUDGET, rel=0.05)
    flagship = RunDir(told / "flagship").record()
    assert flagship is not None
    assert (flagship.status, flagship.run_id) == ("ok", forecast.spec.run_id)
    assert (told / "flagship" / "forecast.json").read_bytes() == (told / "forecast.json").read_bytes()
    postmortem = json.loads((told / "postmortem.json").read_text())
    keys = {
        "forecast_loss",
        "actual_loss",
        "relative_error",
        "inside_50",
        "inside_90",
        "extrapolation_ratio",
        "seal_ok",
    }
    assert keys <= set(postmortem)
    assert postmortem["seal_ok"] is True
    assert postmortem["forecast_loss"] == forecast.loss
    assert postmortem["actual_loss"] == flagship.loss
    assert postmortem["relative_error"] == pytest.approx(forecast.loss / postmortem["actual_loss"] - 1)
    assert math.isclose(postmortem["extrapolation_ratio"], forecast.extrapolation_ratio)
    report = (told / "report.html").read_text()
    assert "</html>" in report
    assert 'src="plots/' not in report  # self-contained
    plots = list((told / "plots").iterdir())
    assert len(plots) >= 3
    assert all(path.stat().st_size > 1000 for path in plots)


def test_told_again_nothing_is_redone(told: Path, command: Command) -> None:
    before, postmortem = kept(told), (told / "postmortem.json").read_bytes()
    for words in story(told):
        done = command(*words)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    assert kept(told) == before
    assert (told / "postmortem.json").read_bytes() == postmortem


@pytest.mark.parametrize("where", ["forecast.json", "edited.json"])
def test_an_edited_forecast_is_refused(told: Path, command: Command, where: str) -> None:
    original = (told / "forecast.json").read_bytes()
    forecast = json.loads(original)
    forecast["loss"] -= 0.1
    path = told / where
    path.write_text(json.dumps(forecast))
    try:
        for words in (
            ["train.flagship", f"forecast={path}", f"run.dir={told / 'edited'}"],
            ["analysis.postmortem", str(told / "flagship"), "--forecast", str(path), "--out", str(told / "edited")],
        ):
            done = command(*words)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert "seal" in done.stderr
        assert not (told / "edited").exists()
    finally:
        path.unlink()
        (told / "forecast.json").write_bytes(original)
