"""One sbatch of a sweep: which runs each of its jobs trains, and what became of the jobs.

SWEEP/jobs/ARRAY/array.json           the jobs' runs and settings, written before sbatch is called
                 submitit/            submitit's scripts, pickles and the jobs' own output
                 TASK/0001/job.json   one folder a start of the job, the highest owns the job; the workers' logs
                 TASK/result.json     the job is through: what it gave up, or why it could not work
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaling.config import from_dict, to_dict
from scaling.files import read_json, read_versioned, write_json
from scaling.provenance import git_commit, slurm_ids, utc_now


@dataclass(frozen=True)
class JobArray:
    """array.json: what the jobs of one sbatch need to know."""

    VERSION = 1
    launch: str
    """Hex id of the launch: failures of a run are counted in it."""
    job_name: str
    """Unique: squeue finds the jobs by it, whatever their ids."""
    commit: str | None
    """Of the code that planned them; None: the jobs may run any."""
    command: list[str]
    """A worker's command line."""
    environment: dict[str, str]
    workers: int
    """Processes at once in a job."""
    max_attempts: int
    tasks: list[list[str]]
    """The run ids of each job, in the order in which they are to be claimed."""

    @classmethod
    def read(cls, folder: Path) -> JobArray:
        return from_dict(cls, read_versioned(folder / "array.json", "job array", cls.VERSION))

    def write(self, folder: Path) -> None:
        write_json(folder / "array.json", {"schema_version": self.VERSION, **to_dict(self)})


class JobDir:
    """The folder of one job of an array."""

    def __init__(self, array: Path, task: int) -> None:
        self.array, self.task = array, task
        self.path = array / f"{task:04d}"
        self.result_json = self.path / "result.json"

    def last_start(self) -> int:
        """How often the job has been started."""
        try:
            return max((int(name) for name in os.listdir(self.path) if name.isdigit()), default=0)
        except FileNotFoundError:
            return 0

    def start(self) -> int:
        """Begin another start of the job, which fences the ones before. Returns its number."""
        self.path.mkdir(parents=True, exist_ok=True)
        while True:
            number = self.last_start() + 1
            try:
                self.start_dir(number).mkdir()
            except FileExistsError:
                continue
            write_json(
                self.start_dir(number) / "job.json",
                {"slurm": slurm_ids(), "started": utc_now(), "commit": git_commit(), "pid": os.getpid()},
            )
            return number

    def start_dir(self, number: int) -> Path:
        """The folder of one start."""
        return self.path / f"{number:04d}"

    def key(self, number: int) -> str:
        """The start's name in leases and in JOB_VARIABLE."""
        return f"{self.array.name}/{self.task:04d}/{number}"

    def finish(self, failed: dict[str, str], error: str | None = None) -> None:
        """Say that the job is through.

        Args:
            failed: runs given up, with the reason.
            error: why no worker could work.
        """
        write_json(self.result_json, {"failed": failed, "error": error})

    def result(self) -> dict[str, Any] | None:
        """What the job came to; None while it is not through."""
        if not self.result_json.exists():
            return None
        result: dict[str, Any] = read_json(self.result_json, "job result")
        return result
