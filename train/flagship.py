"""ENTRY python -m train.flagship forecast=PATH: the full-size run that a sealed forecast asks for."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scaling import compose
from scaling.config import from_dict
from scaling.cost import run_seconds
from scaling.errors import InputError, run_command
from scaling.hardware import cpu_count, find_device
from scaling.launch import LocalLauncher
from scaling.pool import train_worker
from scaling.ranks import find_place, run_ranks
from scaling.records import Forecast, RunRecord
from scaling.slurm.jobs import SlurmJobs
from scaling.slurm.launcher import SlurmLauncher
from scaling.spec import RollbackSpec, RunSpec
from scaling.sweepdir import RunDir, SweepDir, check_writable, default_cache
from scaling.text import readable_time

HASHED_BYTES = 16 << 30
"""Of tokens that are read through before a run's first step: some 20 s at 1 GB/s."""
HELP = """\
usage: python -m train.flagship forecast=PATH [SETTING=VALUE …]

Trains the run that forecast.json asks for, with the same loop as the sweep's runs; the same command resumes it.
Refuses a forecast that was changed after it was sealed.

settings:
  forecast=PATH        forecast.json, written by python -m analysis.fit --out DIR
  run.dir=DIR          the run's folder (default: flagship/ beside the forecast)
  run.threads=N        CPU threads of a process (default: every core, shared by the processes of this machine)
  run.processes=N      train on N processes of this machine; under torchrun or srun each task is a rank without it
  run.layout=TEXT      of several ranks, as tensor=2,context=2; ranks that it does not name are data ranks
  launcher.device=cpu  cpu | cuda
  launcher=slurm       a job on SLURM: launcher.nodes=2 launcher.gpus_per_node=8 launcher.layout=tensor=8, and what else
                       conf/launcher/slurm.yaml has; this command follows it, and submits it again when it is lost
  launcher.checkpoint_every_s=20   seconds between checkpoints
  wandb.mode=disabled  disabled | offline | online
  on_alarm=none        warn | checkpoint | stop: start python -m analysis.watch beside the run, which compares it with the
                       forecast's path as it trains; its lines go to RUN/watch.log, its page is RUN/watch.html
  rollback=false       true: a loss spike goes back to a checkpoint from before it and passes over the batches, 3 times at most
                       (scaling.spec.RollbackSpec); the record says where, the forecast holds for it as it is
  accept_extrapolation=false   true: train though the target is over 300× the largest run's compute
  dry_run=true         print what would be trained, and how long it may take; start nothing

exit status: 0 done, 1 diverged, 2 bad input, 130 interrupted
"""


@dataclass(frozen=True)
class FlagshipRun:
    """Where and how the flagship runs."""

    dir: str | None = None
    threads: int | None = None
    processes: int | None = None
    layout: str = ""


@dataclass(frozen=True)
class FlagshipSettings:
    """conf/flagship.yaml with the command line on it."""

    forecast: str | None
    run: FlagshipRun
    launcher: LocalLauncher | SlurmLauncher
    wandb: Literal["disabled", "offline", "online"]
    on_alarm: Literal["none", "warn", "checkpoint", "stop"]
    rollback: bool
    accept_extrapolation: bool
    dry_run: bool


def read_settings(argv: Sequence[str]) -> FlagshipSettings:
    """Compose and read strictly."""
    config = compose.load("flagship", argv)
    launcher = SlurmLauncher if config["launcher"]["name"] == "slurm" else LocalLauncher
    return from_dict(
        FlagshipSettings,
        {
            "forecast": config["forecast"],
            "run": config["run"],
            "launcher": from_dict(launcher, config["launcher"], "launcher"),
            "wandb": config["wandb"]["mode"],
            "on_alarm": config["on_alarm"],
            "rollback": config["rollback"],
            "accept_extrapolation": config["accept_extrapolation"],
            "dry_run": config["dry_run"],
        },
    )


def main(argv: Sequence[str]) -> int:
    """Check the seal, then train."""
    if any(text in ("-h", "--help", "help") for text in argv):
        print(HELP.rstrip())
        return 0
    settings = read_settings(argv)
    if settings.forecast is None:
        raise InputError("no forecast: give forecast=PATH, the forecast.json of python -m analysis.fit --out DIR")
    path = Path(settings.forecast)
    place = find_place(os.environ)
    run = RunDir(Path(settings.run.dir) if settings.run.dir else path.parent / "flagship")
    threads = settings.run.threads or max(1, cpu_count() // (settings.run.processes or 1))
    if place is not None and not settings.dry_run:
        return _train(settings, path, run, threads)
    if place is not None and place.rank:
        return 0
    forecast = Forecast.read(path)
    _introduce(settings, forecast, threads)
    _check(settings, forecast)
    if settings.dry_run:
        return 0
    if isinstance(settings.launcher, SlurmLauncher):
        spec = _claim_folder(settings, run, path)
        with _watched(run, settings.on_alarm):
            return _train_on_slurm(settings.launcher, spec, run, settings.wandb)
    if settings.run.processes:
        again = [word for word in argv if not word.startswith(("run.processes=", "run.threads="))]
        command = [sys.executable, "-m", "train.flagship", *again, f"run.threads={threads}"]
        return run_ranks(command, settings.run.processes)
    return _train(settings, path, run, threads)


def _check(settings: FlagshipSettings, forecast: Forecast) -> None:
    """Refuse what the forecast does not carry."""
    if forecast.extrapolation_colour == "red" and not settings.accept_extrapolation:
        raise InputError(
            f"{forecast.extrapolation_ratio:.3g}× the largest run's compute is red (above 300×): nothing was tested that far; "
            "train something in between first, or take the risk with accept_extrapolation=true"
        )
    if settings.on_alarm != "none" and not forecast.channels and not settings.dry_run:
        raise InputError(
            f"on_alarm={settings.on_alarm}: this forecast has no path to watch (its sweep's metrics were not at hand); "
            "leave on_alarm out"
        )


def _introduce(settings: FlagshipSettings, forecast: Forecast, threads: int) -> None:
    """Say what will be trained."""
    spec = forecast.spec
    print(
        f"flagship {spec.run_id}: width {spec.shape.width}, depth {spec.shape.depth}, {spec.params.body_head:,} parameters,"
        f" {spec.tokens:,} tokens, {spec.flops:.3g} FLOPs ({forecast.extrapolation_ratio:.1f}× the largest run)\n"
        f"sealed forecast {forecast.loss:.4f}, 90% {forecast.interval_90[0]:.4f} to {forecast.interval_90[1]:.4f}"
    )
    if forecast.limits:
        print("within " + ", ".join(f"{name} {value}" for name, value in forecast.limits.items()))
    if settings.launcher.device == "cpu":
        print(f"about {readable_time(run_seconds(spec, find_device('cpu')))} of one core; {threads} at work")


def _train_on_slurm(launcher: SlurmLauncher, spec: RunSpec, run: RunDir, wandb: str) -> int:
    """Have a SLURM job train the run, as a sweep of this run alone: slurm/ in its folder, where runs/ID is the folder itself."""
    launcher.check_cluster()
    run.create(spec)
    sweep = SweepDir(run.path / "slurm")
    sweep.runs.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        sweep.run(spec.run_id).path.symlink_to(run.path.resolve(), target_is_directory=True)
    threads = str(launcher.threads)
    environment = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "ISOFLOP_CACHE": str(default_cache().absolute()),
    }
    seconds = run_seconds(spec, find_device("cpu" if launcher.device == "cpu" else "h100"))
    command = [*train_worker(), *launcher.worker_options(), "--wandb", wandb]
    with sweep.launcher_lock() as is_held:
        if not is_held:
            raise InputError(f"another train.flagship follows this run's job: {sweep.lock_holder()}")
        jobs = SlurmJobs(sweep, [spec], {spec.run_id: seconds}, launcher, command, environment, any_commit=True)
        jobs.run(lambda: None)
    record = run.record()
    if record is None:
        print(f"flagship failed: {jobs.failed.get(spec.run_id)}")
        return 1
    return _say_end(record)


def _say_end(record: RunRecord) -> int:
    """What it came to, and the exit status."""
    if record.status != "ok":
        print(f"flagship {record.status}: {record.reason}")
        return 1
    print(f"flagship done: loss {record.loss:.4f} nats per token, {record.tokens_per_s:,.0f} tokens/s")
    return 0


def _train(settings: FlagshipSettings, path: Path, run: RunDir, threads: int) -> int:
    """Train, alone or as one rank of several. Returns the exit status."""
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch reads it
    from train.engine import Host, train
    from train.engine.parallel.world import as_rank, device_of, find_world
    from train.engine.signals import install_handlers

    install_handlers()
    world = find_world()
    host = Host(
        device_of(settings.launcher.device, world, os.environ),
        threads,
        micro_batch_tokens=settings.launcher.micro_batch_tokens,
        checkpoint_every_s=settings.launcher.checkpoint_every_s,
        compile=settings.launcher.compile,
        attention=settings.launcher.attention,
        recompute=settings.launcher.recompute,
        memory_budget_bytes=settings.launcher.memory_budget_bytes,
        cuda_graphs=settings.launcher.cuda_graphs,
        wandb=settings.wandb,
        progress=sys.stderr.isatty(),
        eval_points=20,
        layout=settings.run.layout,
    )

    def work() -> int:
        spec = refused = None
        if world is None or world.leads:
            try:
                spec = _claim_folder(settings, run, path)
            except InputError as error:
                refused = error
        spec, refused = (spec, refused) if world is None else world.share((spec, refused))
        if refused is not None:  # on every rank
            raise refused
        assert spec is not None
        leads = world is None or world.leads
        with _watched(run, settings.on_alarm) if leads else contextlib.nullcontext():
            record = train(spec, run, host, world=world)
        return _say_end(record) if leads else int(record.status != "ok")

    return as_rank(world, host.device, work)


@contextlib.contextmanager
def _watched(run: RunDir, on_alarm: str) -> Iterator[None]:
    """With python -m analysis.watch beside what runs here, unless on_alarm is none; it ends with the run."""
    if on_alarm == "none":
        yield
        return
    command = [sys.executable, "-m", "analysis.watch", str(run.path), "--on-alarm", on_alarm]
    with open(run.path / "watch.log", "a", encoding="utf-8") as log:
        watch = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
        with contextlib.suppress(subprocess.TimeoutExpired):
            watch.wait(30)  # for its look at the last step
    finally:
        watch.terminate()
        watch.wait()


def _claim_folder(settings: FlagshipSettings, run: RunDir, path: Path) -> RunSpec:
    """Leave a copy of the sealed forecast in the run's folder. Returns what to train there.

    Raises:
        InputError: the seal is broken, the forecast refused, the corpus not the sweep's, or the folder another run's.
    """
    forecast = Forecast.read(path)
    _check(settings, forecast)
    spec = dataclasses.replace(forecast.spec, rollback=RollbackSpec()) if settings.rollback else forecast.spec
    _check_corpus(spec, is_first_start=not run.spec_json.exists())
    check_writable(run.path)
    if run.spec_json.exists() and run.spec().run_id != spec.run_id:
        raise InputError(
            f"{run.path} holds run {run.spec().run_id}, the forecast asks for {spec.run_id}: give another run.dir"
        )
    copy = run.path / "forecast.json"
    if not copy.exists():
        shutil.copyfile(path, copy)
    run.create(spec)  # the watch asks for it
    return spec


def _check_corpus(spec: RunSpec, is_first_start: bool) -> None:
    """Refuse another text or tokenizer than the sweep's: the forecast holds for losses on those alone.

    Args:
        is_first_start: read the corpus through, up to HASHED_BYTES, for files that were changed in place.
    Raises:
        InputError: the sweep's corpus is not here, or its files are not what its digest says.
    """
    from train.data.shards import Corpus, corpora_named, digest_of

    digest, name = str(spec.data.digest), f"data={spec.data.name}"
    folder = default_cache() / "data" / digest
    if not (folder / "manifest.json").exists():
        here = [f"{other.digest} of {other.vocab_size:,} tokens" for other in corpora_named(spec.data.name)]
        raise InputError(
            f"the sweep was trained on corpus {digest} ({name}, a vocabulary of {spec.shape.vocab_size:,}), which is not in "
            f"{folder.parent} ({name} there: {', '.join(here) or 'none'}): its law says nothing of another text or "
            f"tokenizer; copy that folder from where the sweep was trained, or sweep again on the text of this machine"
        )
    corpus = Corpus.open(digest)
    small = corpus.train.nbytes + corpus.validation.nbytes <= HASHED_BYTES
    if is_first_start and small and (found := digest_of(corpus.folder, corpus.manifest.sources)) != digest:
        raise InputError(
            f"{corpus.folder} was changed: its tokenizer and tokens have the digest {found}, the sweep was trained on {digest}; "
            "delete that folder and prepare it again, or copy it from where the sweep was trained"
        )


if __name__ == "__main__":
    run_command(main)
