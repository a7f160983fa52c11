"""The launcher: resume, retry, give up, extend, two at once, interrupts, and what it refuses to touch."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling.errors import InputError
from scaling.files import write_json
from scaling.launch import LocalLauncher
from scaling.status import describe, sweep_status
from scaling.sweepdir import SweepDir
from scaling.table import COLUMNS, write_runs_csv

SweepWith = Callable[..., tuple[int, SweepDir]]
Cli = Callable[..., subprocess.CompletedProcess[str]]


def tries(sweep: SweepDir) -> list[int]:
    """How often each run was tried, in the plan's order."""
    files = [sweep.run(spec.run_id).path / "tries.txt" for spec in sweep.plan().runs]
    return [len(file.read_text().splitlines()) if file.exists() else 0 for file in files]


def rows(sweep: SweepDir) -> list[dict[str, str]]:
    with open(sweep.runs_csv, newline="") as file:
        return list(csv.DictReader(file))


def test_all_runs_once_and_a_second_launch_does_nothing(sweep_with: SweepWith) -> None:
    assert sweep_with()[0] == 0
    status, sweep = sweep_with()
    assert status == 0
    assert tries(sweep) == [1, 1, 1]
    table = rows(sweep)
    assert tuple(table[0]) == COLUMNS
    assert [row["status"] for row in table] == ["ok"] * 3
    assert [row["seed"] for row in table] == ["0", "1", "2"]
    counts = sweep_status(sweep)
    assert (counts["done"], counts["total"]) == (3, 3)


def test_more_points_are_added_to_the_sweep(sweep_with: SweepWith) -> None:
    sweep_with()
    _, sweep = sweep_with({}, "seed=1,2,3,4")
    assert [spec.seed for spec in sweep.plan().runs] == [0, 1, 2, 3, 4]
    assert tries(sweep) == [1] * 5


def test_a_run_that_raises_is_given_up_and_the_next_launch_tries_again(
    sweep_with: SweepWith, capsys: pytest.CaptureFixture[str]
) -> None:
    status, sweep = sweep_with({1: "raise"})
    assert status == 1
    assert tries(sweep) == [1, 3, 1]
    assert "ValueError: as it was told" in capsys.readouterr().err
    failed = sweep_status(sweep)
    assert (failed["done"], failed["failed"]) == (2, 1)
    assert rows(sweep)[1]["status"] == "failed"
    assert rows(sweep)[1]["reason"] == "ValueError: as it was told"
    assert "as it was told" in describe(failed)

    assert sweep_with()[0] == 0
    assert tries(sweep) == [1, 4, 1]
    assert [row["status"] for row in rows(sweep)] == ["ok"] * 3


def test_divergence_is_final(sweep_with: SweepWith) -> None:
    assert sweep_with({2: "diverge"})[0] == 0
    status, sweep = sweep_with()
    assert status == 0
    assert tries(sweep) == [1, 1, 1]
    assert sweep_status(sweep)["diverged"] == 1
    assert rows(sweep)[2]["reason"] == "loss is NaN at step 3"
    assert rows(sweep)[2]["loss"] == ""


def test_a_killed_worker_is_replaced(sweep_with: SweepWith) -> None:
    status, sweep = sweep_with({0: "kill-once"})
    assert status == 0
    assert tries(sweep) == [2, 1, 1]


def test_a_run_that_keeps_killing_its_worker_is_given_up(sweep_with: SweepWith) -> None:
    status, sweep = sweep_with({0: "kill"}, workers=1)
    assert status == 1
    assert tries(sweep) == [3, 1, 1]
    failed = next(run for run in sweep_status(sweep)["runs"] if run["state"] == "failed")
    assert "died 3 times: killed by SIGKILL" in failed["reason"]


def test_workers_that_cannot_start(
    sweep_with: SweepWith, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scaling.pool.RESPAWN_S", 0.05)
    assert sweep_with({"exit": 3})[0] == 1
    assert "workers end without training (exit status 3)" in capsys.readouterr().err


def test_a_worker_that_refuses_its_input_says_why(sweep_with: SweepWith) -> None:
    with pytest.raises(InputError, match="the worker's own reason"):
        sweep_with({"exit": 2})


def test_edited_spec_is_refused(sweep_with: SweepWith) -> None:
    _, sweep = sweep_with()
    run = sweep.run(sweep.plan().runs[0].run_id)
    spec = json.loads(run.spec_json.read_text())
    write_json(run.spec_json, {**spec, "seed": 9})
    with pytest.raises(InputError, match="was edited"):
        sweep_with()


def test_newer_plan_is_refused(sweep_with: SweepWith) -> None:
    _, sweep = sweep_with()
    plan = json.loads(sweep.plan_json.read_text())
    write_json(sweep.plan_json, {**plan, "schema_version": 99})
    with pytest.raises(InputError, match="newer isoflop"):
        sweep_with()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.n_heads=1", "another family"),
        ("recipe.lr_multiplier=2", "another recipe"),
        ("model.vocab_size=300", "another family"),
    ],
)
def test_another_sweeps_folder_is_refused(sweep_with: SweepWith, setting: str, message: str) -> None:
    _, sweep = sweep_with()
    before = sweep.plan_json.read_text()
    with pytest.raises(InputError, match=message):
        sweep_with({}, setting)
    assert sweep.plan_json.read_text() == before


def test_two_corpora_in_one_sweep_are_refused(sweep_with: SweepWith, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one sweep has one corpus"):
        sweep_with({}, "data=text,stdlib")
    assert not (tmp_path / "sweep").exists()


def test_corpus_too_small_says_how_many_epochs(cli: Cli, settings: list[str], tmp_path: Path) -> None:
    done = cli("scaling.sweep", *settings, "tokens=1e6", "seed=0", "sweep.dir=sweep")
    assert done.returncode == 2
    assert "epochs, above data.max_epochs=1" in done.stderr
    assert "data.max_epochs=5." in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_corpus_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    done = cli("scaling.sweep", "data=text", f"data.path='{tmp_path}/none/*.txt'", "tokens=1e4", "sweep.dir=sweep")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == done.stderr.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_runs_of_one_shape_are_stacked(cli: Cli, settings: list[str], tmp_path: Path) -> None:
    """Two seeds of two widths in one worker: the losses of separate runs."""
    grid = [*settings, "seed=0,1", "model.width=16,24", "launcher.workers=1", "eval.tokens=4096"]
    losses = {}
    for share in ("plain", "stacked"):
        done = cli("scaling.sweep", *grid, f"launcher.share={share}", f"sweep.dir={share}")
        assert done.returncode == 0, done.stderr
        records = SweepDir(tmp_path / share).records()
        assert [record.attempts for record in records] == [1] * 4
        losses[share] = {record.run_id: record.loss for record in records}
    assert losses["stacked"] == pytest.approx(losses["plain"], rel=2e-5)
    for other in ("wandb.mode=offline", "launcher.compile=block", "launcher.recompute=full"):
        done = cli("scaling.sweep", *grid, "launcher.share=stacked", other, "sweep.dir=refused")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"{other} with launcher.share=stacked" in done.stderr
    assert not (tmp_path / "refused").exists()


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="a GPU is here")
def test_no_gpu_here(cli: Cli, settings: list[str], tmp_path: Path) -> None:
    done = cli("scaling.sweep", *settings, "launcher.device=cuda", "sweep.dir=sweep")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "this machine has no GPU: give launcher.device=cpu" in done.stderr
    assert not (tmp_path / "sweep").exists()


def test_a_file_in_the_sweeps_place(cli: Cli, settings: list[str], tmp_path: Path) -> None:
    (tmp_path / "sweep").write_text("mine")
    done = cli("scaling.sweep", *settings, "sweep.dir=sweep/deeper")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write in sweep/deeper")
    assert (tmp_path / "sweep").read_text() == "mine"


def test_another_commits_plan_is_refused_while_runs_are_left(sweep_with: SweepWith) -> None:
    _, sweep = sweep_with()
    plan = json.loads(sweep.plan_json.read_text())
    write_json(sweep.plan_json, {**plan, "commit": "0" * 40})
    assert sweep_with()[0] == 0  # nothing is left to train
    with pytest.raises(InputError, match=f"planned with code {'0' * 40}.*2 runs are left.*sweep.any_commit=true"):
        sweep_with({}, "seed=5,6")
    assert len(sweep.plan().runs) == 3
    assert sweep_with({}, "seed=5,6", "sweep.any_commit=true")[0] == 0


def test_a_resumed_sweep_keeps_its_corpus(
    sweep_with: SweepWith, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_with()

    def prepare(*args: object) -> None:
        raise AssertionError("the corpus was prepared again")

    monkeypatch.setattr("scaling.corpora.prepare_corpus", prepare)
    assert sweep_with({}, "seed=5,6")[0] == 0


LAUNCH = """
import sys
from pathlib import Path
from scaling.errors import run_command
from scaling.grid import expand_grid
from scaling.launch import LocalLauncher, launch
from scaling.sweepdir import SweepDir

def main(argv):
    worker, folder, *overrides = argv
    return launch(SweepDir(Path(folder)), expand_grid(overrides), overrides, LocalLauncher(workers=1),
                  worker_command=[sys.executable, worker])

run_command(main)
"""


def start(cache: Path, sweep: Path, settings: list[str], behaviour: dict[int, str]) -> subprocess.Popen[str]:
    """A launcher in a process of its own."""
    environment = {**os.environ, "ISOFLOP_CACHE": str(cache), "WORKER_BEHAVIOUR": json.dumps(behaviour)}
    worker = str(Path(__file__).with_name("worker.py"))
    command = [sys.executable, "-c", LAUNCH, worker, str(sweep), *settings]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_a_run(sweep: SweepDir) -> int:
    """Wait until a worker holds a run. Returns the worker's process id."""
    for _ in range(300):
        if sweep.plan_json.exists():
            for spec in sweep.plan().runs:
                pid = sweep.run(spec.run_id).holder()
                if (
                    pid is not None
                    and sweep.run(spec.run_id).is_leased()
                    and (sweep.run(spec.run_id).path / "tries.txt").exists()
                ):
                    return pid
        time.sleep(0.1)
    raise AssertionError("no run started")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_the_workers_and_the_next_launch_finishes(
    cache: Path, tmp_path: Path, settings: list[str], number: signal.Signals, sweep_with: SweepWith
) -> None:
    sweep = SweepDir(tmp_path / "sweep")
    launcher = start(cache, sweep.path, settings, dict.fromkeys(range(3), "slow"))
    worker = wait_for_a_run(sweep)
    launcher.send_signal(number)
    _, error = launcher.communicate(timeout=300)
    assert launcher.returncode == 130
    assert "interrupted" in error
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    status, _ = sweep_with()
    assert status == 0
    assert tries(sweep) == [2, 1, 1]


def test_two_launchers_at_once_run_nothing_twice(cache: Path, tmp_path: Path, settings: list[str]) -> None:
    sweep = SweepDir(tmp_path / "sweep")
    both = [start(cache, sweep.path, settings, {}) for _ in range(2)]
    outputs = [launcher.communicate(timeout=300) for launcher in both]
    assert [launcher.returncode for launcher in both] == [0, 0]
    assert tries(sweep) == [1, 1, 1]
    assert all("3 done" in out for out, _ in outputs)


def test_a_second_launcher_says_whom_it_waits_for(cache: Path, tmp_path: Path, settings: list[str]) -> None:
    sweep = SweepDir(tmp_path / "sweep")
    first = start(cache, sweep.path, settings, {0: "slow"})
    wait_for_a_run(sweep)
    second = start(cache, sweep.path, settings, {})
    assert second.stderr is not None
    told = second.stderr.readline()
    assert f"waiting for its launcher (process {first.pid} on " in told
    for launcher in (second, first):
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=300)
    assert first.returncode == second.returncode == 130


def test_orphans_of_a_killed_launcher_are_waited_for(
    cache: Path, tmp_path: Path, settings: list[str], sweep_with: SweepWith
) -> None:
    sweep = SweepDir(tmp_path / "sweep")
    launcher = start(cache, sweep.path, settings, {0: "slow"})
    orphan = wait_for_a_run(sweep)
    launcher.kill()
    launcher.communicate(timeout=300)
    again = start(cache, sweep.path, settings, {})
    while sum(sweep.run(spec.run_id).record_json.exists() for spec in sweep.plan().runs) < 2:
        time.sleep(0.1)
    assert again.poll() is None  # two runs are done, the third is the orphan's
    os.kill(orphan, signal.SIGKILL)
    assert again.wait(timeout=300) == 0
    again.communicate()
    assert sorted(tries(sweep)) == [1, 1, 2]


def test_runs_csv_is_rebuilt_and_status_reads_it_without_the_run_folders(
    sweep_with: SweepWith, cli: Cli, tmp_path: Path
) -> None:
    _, sweep = sweep_with({2: "diverge"})
    text = sweep.runs_csv.read_text()
    sweep.runs_csv.unlink()
    write_runs_csv(sweep)
    assert sweep.runs_csv.read_text() == text
    sweep.runs_csv.write_text("lost")
    assert cli("scaling.status", "sweep", "--csv").returncode == 0
    assert sweep.runs_csv.read_text() == text
    (sweep.runs).rename(tmp_path / "elsewhere")
    refused = cli("scaling.status", "sweep", "--csv")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert sweep.runs_csv.read_text() == text
    done = cli("scaling.status", "sweep", "--json", "-")
    status = json.loads(done.stdout)
    assert (status["done"], status["diverged"], status["pending"], status["total"]) == (2, 1, 0, 3)
    assert status["runs"][0]["loss"] == 3.0


def test_status_of_no_sweep(cli: Cli) -> None:
    done = cli("scaling.status", "nowhere")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no sweep folder at nowhere" in done.stderr


def test_a_folder_that_cannot_be_written(cli: Cli, settings: list[str]) -> None:
    done = cli("scaling.sweep", *settings, "sweep.dir=/proc/sweep")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot write in /proc/sweep" in done.stderr


@pytest.mark.parametrize("setting", ["workers=0", "threads=0", "max_attempts=0", "checkpoint_every_s=-1"])
def test_launcher_settings_that_cannot_be(setting: str) -> None:
    name, value = setting.split("=")
    with pytest.raises(InputError, match=f"launcher.{name} = {value}"):
        LocalLauncher(**{name: int(value)})  # type: ignore[arg-type]


def test_a_full_disk_leaves_no_half_written_plan(
    sweep_with: SweepWith, cli: Cli, settings: list[str], tmp_path: Path
) -> None:
    """A limit on file size stands for the disk: the specs fit, the plan does not."""
    sweep_with()  # so that the corpus is there
    done = cli(
        "scaling.sweep",
        *settings,
        "sweep.dir=full",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048)),
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "File too large" in done.stderr
    assert not (tmp_path / "full").exists()
