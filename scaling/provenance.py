"""What code a run was made by: git commit, library versions, UTC time."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path


def utc_now() -> str:
    """UTC time, ISO 8601, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@cache
def git_commit() -> str | None:
    """Commit of the clone that this package runs from, "+dirty" appended when tracked files differ; None outside one."""
    root = Path(__file__).resolve().parents[1]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+dirty" if changed.stdout.strip() else "")


@cache
def code_digest() -> str:
    """First 12 hex of sha256 over the planner's and the engine's sources: what runs, committed or not."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(path for package in ("scaling", "train") for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def slurm_ids() -> dict[str, str] | None:
    """The SLURM job that this process belongs to: job (12 or 12_3), restarts, node, cluster; None outside one."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    return {
        "job": job if task is None else f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}",
        "restarts": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "node": os.environ.get("SLURMD_NODENAME", ""),
        "cluster": os.environ.get("SLURM_CLUSTER_NAME", ""),
    }


def versions(*packages: str) -> dict[str, str]:
    """Python's version and those of the installed packages named."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
