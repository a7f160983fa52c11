"""Runs to a finished sweep, here or on SLURM: corpus, plan, workers, runs.csv; the same call resumes, retries, extends."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from scaling.branches import with_digests
from scaling.config import to_dict
from scaling.corpora import check_epochs, check_one_source, sweep_corpora
from scaling.cost import run_seconds
from scaling.errors import InputError
from scaling.grid import GridRuns
from scaling.hardware import check_gpu, cpu_count, find_device
from scaling.pool import WorkerError, WorkerPool, terminate_as_interrupt, train_worker
from scaling.progress import Progress
from scaling.provenance import git_commit, utc_now
from scaling.records import DataManifest, Plan
from scaling.slurm.jobs import SlurmJobs
from scaling.slurm.launcher import SlurmLauncher
from scaling.spec import RunSpec
from scaling.sweepdir import SweepDir, check_writable, default_cache
from scaling.table import write_runs_csv
from scaling.text import readable_time
from scaling.workers import WorkerSettings


@dataclass(frozen=True)
class LocalLauncher(WorkerSettings):
    """A pool of processes on this machine."""

    name: Literal["local"] = "local"
    workers: int | None = None
    """Processes at once; None: one a core, or one on a GPU."""
    device: Literal["cpu", "cuda"] = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(workers=1)

    @property
    def pool_size(self) -> int:
        """Processes at once."""
        if self.device == "cpu":
            return self.workers or max(1, cpu_count() // self.threads)
        return self.workers or (self.share_runs if self.share == "processes" else 1)

    def worker_options(self) -> list[str]:
        """The worker's options for these settings."""
        return self.options(self.device)


def launch(
    sweep: SweepDir,
    grid: GridRuns,
    overrides: Sequence[str],
    launcher: LocalLauncher | SlurmLauncher,
    wandb: str = "disabled",
    worker_command: Sequence[str] | None = None,
    hardware: str = "cpu",
) -> int:
    """Plan the grid's runs into the sweep's folder, train those that are missing or failed, and write runs.csv.

    Args:
        sweep: the folder; a plan that is there already is added to.
        grid: the runs.
        overrides: the command line, kept in the plan.
        launcher: where the workers run, and how many.
        wandb: disabled | offline | online.
        worker_command: a worker's command line; None: `python -m train.run`.
        hardware: the device that run times are estimated for: the longest run starts first.
    Returns:
        Exit status: 0 when every run of this call is done or diverged, or submitted with sweep.wait=false; 1 when some
        failed.
    Raises:
        InputError: a folder that cannot be written, a corpus that cannot be used or is too small, another sweep's
            folder, jobs that the cluster cannot run, a plan made with other code.
    """
    check_one_source(grid.specs)
    if isinstance(launcher, SlurmLauncher):
        launcher.check_cluster()
    elif not grid.sweep.wait:
        raise InputError("sweep.wait=false needs launcher=slurm: a sweep on this machine ends with its launcher")
    elif launcher.device == "cuda":
        check_gpu()
    check_share(launcher, wandb)
    check_commit(sweep, grid.specs, grid.sweep.any_commit)
    existed = sweep.path.exists()
    check_writable(sweep.path)
    try:
        with terminate_as_interrupt():
            corpora = sweep_corpora(sweep, grid.specs)
            check_epochs(grid.specs, corpora)
            specs = with_digests(grid.specs, {vocab: corpus.digest for vocab, corpus in corpora.items()})
            with _launcher_lock(sweep):
                with _file_errors():
                    write_plan(sweep, grid, specs, list(corpora.values()), overrides)
                command = [*(worker_command or train_worker()), *launcher.worker_options(), "--wandb", wandb]
                pool = _pool(sweep, specs, launcher, command, hardware, grid.sweep.any_commit)
                if isinstance(pool, SlurmJobs) and not grid.sweep.wait:
                    return _submit(pool, sweep)
                return _train(sweep, specs, pool)
    except BaseException:
        if not existed and not sweep.plan_json.exists():
            _remove_empty(sweep)
        raise


def _remove_empty(sweep: SweepDir) -> None:
    """Leave nothing of a sweep that could not be planned."""
    sweep.lock.unlink(missing_ok=True)
    shutil.rmtree(sweep.runs, ignore_errors=True)
    with contextlib.suppress(OSError):
        sweep.path.rmdir()


def _pool(
    sweep: SweepDir,
    specs: list[RunSpec],
    launcher: LocalLauncher | SlurmLauncher,
    command: list[str],
    hardware: str,
    any_commit: bool,
) -> WorkerPool | SlurmJobs:
    """Workers of this machine, or jobs; the longest run first."""
    device = find_device("cpu" if launcher.device == "cpu" else hardware)
    seconds = {spec.run_id: run_seconds(spec, device) for spec in specs}
    threads = str(launcher.threads)
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    if isinstance(launcher, SlurmLauncher):
        environment["ISOFLOP_CACHE"] = str(default_cache().absolute())
        return SlurmJobs(sweep, specs, seconds, launcher, command, environment, any_commit)
    longest_first = sorted(seconds, key=lambda run_id: seconds[run_id], reverse=True)
    return WorkerPool(sweep, longest_first, launcher.pool_size, command, environment, launcher.max_attempts)


def _submit(jobs: SlurmJobs, sweep: SweepDir) -> int:
    """The jobs submitted, and no waiting for them."""
    count = jobs.submit_missing()
    if count is None:
        raise InputError("SLURM's controller does not answer: nothing was submitted; try again when it is back")
    print(f"{sweep.path}: {len(jobs.open)} runs open, {count} jobs submitted; python -m scaling.status {sweep.path}")
    return 0


def _train(sweep: SweepDir, specs: list[RunSpec], pool: WorkerPool | SlurmJobs) -> int:
    """The workers, and what is left to say when they are through."""
    started = time.monotonic()
    with Progress(sweep, specs) as progress, _file_errors():
        try:
            pool.run(progress.update)
        except KeyboardInterrupt:
            if isinstance(pool, SlurmJobs):
                print("the jobs go on; scancel ends them", file=sys.stderr)
            raise
        except WorkerError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            write_runs_csv(sweep)
    states = Counter(sweep.run(spec.run_id).state() for spec in specs)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    print(f"{sweep.path}: {len(specs)} runs: {counts}, in {readable_time(time.monotonic() - started)}")
    for run_id, reason in pool.failed.items():
        print(f"failed: {run_id}: {reason} (the whole story is in {sweep.run(run_id).attempts})", file=sys.stderr)
    return 0 if set(states) <= {"done", "diverged"} else 1


def check_share(launcher: LocalLauncher | SlurmLauncher, wandb: str) -> None:
    """Refuse stacked runs with what trains one run at a time.

    Raises:
        InputError: wandb, compilation or recomputation.
    """
    others: dict[str, tuple[object, object]] = {"wandb.mode": (wandb, "disabled")}
    others |= {f"launcher.{name}": (getattr(launcher, name), "none") for name in ("compile", "recompute")}
    others |= {"launcher.cuda_graphs": (launcher.cuda_graphs, False)}
    for setting, (value, only) in others.items():
        if launcher.share == "stacked" and value != only:
            raise InputError(
                f"{setting}={value} with launcher.share=stacked: give {setting}={only}, or launcher.share=processes"
            )


def check_commit(sweep: SweepDir, specs: Sequence[RunSpec], any_commit: bool) -> None:
    """Refuse to go on with a sweep that other code planned: its runs would not all be trained by the same.

    Raises:
        InputError: the plan's commit is not this one, some of the runs are not done, and any_commit is not set.
    """
    if any_commit or not sweep.plan_json.exists():
        return
    plan, now = sweep.plan(), git_commit()
    left = [spec for spec in specs if not sweep.run(plan.prepared(spec).run_id).record_json.exists()]
    if left and plan.commit != now:
        raise InputError(
            f"{sweep.path} was planned with code {plan.commit}, this is {now}, and {len(left)} runs are left to train: check "
            "that commit out, or, if the change does not touch what runs train to, give sweep.any_commit=true; a sweep of "
            "this code's own is sweep.dir=PATH"
        )


def write_plan(
    sweep: SweepDir, grid: GridRuns, specs: list[RunSpec], corpora: list[DataManifest], overrides: Sequence[str]
) -> None:
    """Write plan.json and the runs' folders; a plan that is there is added to.

    Raises:
        InputError: the folder's plan is of another corpus, family or recipe, or newer; a spec.json was edited.
    """
    plan = Plan(
        name=sweep.path.name,
        grid=grid.grid.name,
        overrides=list(overrides),
        created=utc_now(),
        commit=git_commit(),
        family=grid.base.family,
        recipe=grid.base.recipe.to_dict(),
        data=corpora[0],
        runs=specs,
        further_data=corpora[1:],
    )
    old = sweep.plan() if sweep.plan_json.exists() else None
    if old is not None:
        planned = {corpus.vocab_size: corpus for corpus in old.corpora}
        compared = [("family", old.family, plan.family), ("recipe", old.recipe, plan.recipe)]
        compared += [("data", planned[c.vocab_size], c) for c in corpora if c.vocab_size in planned]
        for what, *both in compared:
            before, now = map(to_dict, both)
            if before != now:
                changed = ", ".join(f"{k} {before.get(k)!r} → {now[k]!r}" for k in now if now[k] != before.get(k))
                raise InputError(
                    f"{sweep.path} was planned with another {what} ({changed}): "
                    "give this sweep its own folder, sweep.dir=PATH"
                )
        known = {spec.run_id for spec in old.runs}
        plan = dataclasses.replace(
            old,
            runs=old.runs + [spec for spec in specs if spec.run_id not in known],
            further_data=old.further_data + [c for c in corpora if c.vocab_size not in planned],
        )
    with ThreadPoolExecutor(16) as threads:  # each waits for the disk
        list(threads.map(sweep.create_run, specs))
    if plan != old:
        plan.write(sweep.plan_json)


@contextlib.contextmanager
def _launcher_lock(sweep: SweepDir) -> Iterator[None]:
    """Be the only launcher of the sweep: wait for another one, saying who it is."""
    told = False
    while True:
        with sweep.launcher_lock() as held:
            if held:
                yield
                return
        if not told:
            print(f"{sweep.path}: waiting for its launcher ({sweep.lock_holder()})", file=sys.stderr, flush=True)
            told = True
        time.sleep(0.5)


@contextlib.contextmanager
def _file_errors() -> Iterator[None]:
    """A full disk, a folder that became read-only: one line instead of a traceback."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or 'writing the sweep'}: {error.strerror or error}") from None
