"""launcher=slurm: the settings of the jobs, checked against the cluster before anything is submitted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from scaling.errors import InputError, unknown
from scaling.slurm import cluster
from scaling.workers import WorkerSettings


@dataclass(frozen=True)
class SlurmLauncher(WorkerSettings):
    """Jobs on a SLURM cluster; one job is a pool of worker processes on one node, or trains one run at a time on several."""

    name: Literal["slurm"] = "slurm"
    partition: str | None = None
    """None: the cluster's default."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features that a node must have, as sbatch reads them."""
    nodes: int = 1
    """Nodes of a job. Above 1 all of a job's ranks train a run together: one a GPU, or one a node on the CPU."""
    layout: str = ""
    """Of a run on several nodes, as tensor=8,pipeline=2; ranks that it does not name are data ranks."""
    gpus_per_node: int = 0
    """GPUs of a job; 0: it trains on the CPU."""
    cpus_per_task: int = 1
    """CPU cores of a job."""
    mem: str = "4G"
    """Memory of a job, as sbatch reads it."""
    time: int = 60
    """Time limit of a job, minutes. Runs that are not through by then go on in the same job, requeued."""
    array_parallelism: int = 256
    """Jobs of one array at once."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the workers: modules, environments."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch, without the dashes: {exclude: n7}."""
    job_minutes: float = 30.0
    """Small runs are packed into jobs of about this many minutes."""
    checkpoint_every_s: float = 60.0
    """Seconds between a run's checkpoints: the most work that a lost node costs."""
    signal_delay_s: int = 90
    """Seconds before the time limit at which the workers write their last checkpoint."""
    queue_poll_s: float = 15.0
    """Seconds between two looks at squeue."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_least(nodes=1, gpus_per_node=0, cpus_per_task=1, time=1, array_parallelism=1, signal_delay_s=0)
        for name in ("job_minutes", "queue_poll_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"launcher.{name} = {getattr(self, name)}: must be positive")
        if self.threads > self.cpus_per_task:
            raise InputError(
                f"launcher.threads = {self.threads} of one worker are more than the job's launcher.cpus_per_task = "
                f"{self.cpus_per_task}: raise cpus_per_task"
            )
        if self.nodes > 1 and self.share != "plain":
            raise InputError(
                f"launcher.share = {self.share} with launcher.nodes = {self.nodes}: a run of several nodes has its GPUs to "
                "itself: give launcher.share=plain"
            )
        if 60 * self.time <= self.checkpoint_every_s + self.signal_delay_s:
            raise InputError(
                f"launcher.time = {self.time} min is shorter than one checkpoint interval and the signal before the "
                f"limit ({self.checkpoint_every_s:g} s + {self.signal_delay_s} s): raise launcher.time, or lower "
                "launcher.checkpoint_every_s or launcher.signal_delay_s"
            )

    @property
    def device(self) -> str:
        """What the workers train on."""
        return "cuda" if self.gpus_per_node else "cpu"

    @property
    def ranks_per_node(self) -> int:
        """Processes of a node that train a run together with those of the other nodes; of a job on one node 1."""
        return max(1, self.gpus_per_node) if self.nodes > 1 else 1

    @property
    def workers_per_job(self) -> int:
        """Runs at once in a job."""
        if self.nodes > 1:
            return 1
        return (
            self.gpus_per_node * (self.share_runs if self.share == "processes" else 1)
            or self.cpus_per_task // self.threads
        )

    @property
    def pool_size(self) -> int:
        """Processes at once, when the cluster gives as many jobs as it may."""
        return self.array_parallelism * self.workers_per_job

    def worker_options(self) -> list[str]:
        """The worker's options for these settings."""
        return self.options(self.device, self.layout)

    def sbatch_parameters(self) -> dict[str, Any]:
        """The job's parameters under submitit's names."""
        named = {name: getattr(self, name) for name in ("partition", "account", "qos", "constraint")}
        return {name: value for name, value in named.items() if value is not None} | {
            "nodes": self.nodes,
            "ntasks_per_node": self.ranks_per_node,
            "cpus_per_task": self.cpus_per_task,
            "mem": self.mem,
            "time": self.time,
            **({"gpus_per_node": self.gpus_per_node} if self.gpus_per_node else {}),
        }

    def check_cluster(self) -> None:
        """Refuse what this cluster cannot run.

        Raises:
            InputError: no SLURM here, no answer, an unknown partition, more than a node has, or whatever else sbatch
                refuses (account, QOS, constraint, memory).
        """
        cluster.check_commands()
        nodes = cluster.nodes()
        if self.partition is not None:
            if self.partition not in {node.partition for node in nodes}:
                raise unknown("launcher.partition", self.partition, {node.partition for node in nodes})
            nodes = [node for node in nodes if node.partition == self.partition]
        else:
            nodes = [node for node in nodes if node.is_default] or nodes
        where = f"partition {nodes[0].partition}" if nodes else "this cluster"
        for name, has in (("gpus_per_node", "gpus"), ("cpus_per_task", "cpus")):
            most = max((getattr(node, has) for node in nodes), default=0)
            if getattr(self, name) > most:
                raise InputError(
                    f"launcher.{name} = {getattr(self, name)}: a node of {where} has {most}: give at most that, or "
                    "another launcher.partition"
                )
        limit_s = max((node.limit_s for node in nodes), default=0.0)
        if 60 * self.time > limit_s:
            raise InputError(
                f"launcher.time = {self.time} min: {where} allows {limit_s / 60:g} min: give at most that (runs that "
                "take longer go on in the same job, requeued)"
            )
        parameters = {**self.sbatch_parameters(), **self.sbatch}
        options = {f"--{key.replace('_', '-')}": value for key, value in parameters.items()}
        refusal = cluster.would_submit([key if value is True else f"{key}={value}" for key, value in options.items()])
        if refusal:
            given = ", ".join(f"{name}={value}" for name, value in parameters.items())
            raise InputError(f"sbatch refuses such a job: {refusal} (launcher: {given})")
