"""Runs to jobs: several small ones share a job and its start-up, the longest first; a long one has a job of its own."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping


def pack(seconds: Mapping[str, float], job_s: float, workers: int) -> list[list[str]]:
    """Runs by job, jobs and the runs in each from the longest down.

    Longest processing time first (Graham 1969): each run goes to the job with the least work so far, which ends within
    4/3 of the best possible time.

    Args:
        seconds: estimated time of each run by run_id.
        job_s: work that a job's workers should have each.
        workers: processes at once in a job.
    """
    total = math.fsum(min(time_s, job_s) for time_s in seconds.values())
    count = min(len(seconds), max(1, math.ceil(total / (job_s * workers))))
    jobs: list[tuple[float, int, list[str]]] = [(0.0, number, []) for number in range(count)]
    for run_id in sorted(seconds, key=lambda run_id: seconds[run_id], reverse=True):
        work_s, number, runs = heapq.heappop(jobs)
        heapq.heappush(jobs, (work_s + seconds[run_id], number, [*runs, run_id]))
    return [runs for _, _, runs in sorted(jobs, key=lambda job: (-job[0], job[1]))]
