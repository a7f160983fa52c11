"""A worker that trains nothing: it claims runs and writes records as train.run does, and fails as it is told to."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from scaling.accounting import FLOPS_CONVENTIONS, PARAMS_CONVENTIONS, training_flops
from scaling.records import RunRecord
from scaling.spec import RunSpec
from scaling.sweepdir import LAUNCH_VARIABLE, RunDir, SweepDir


def record(spec: RunSpec, attempt: int, status: str) -> RunRecord:
    return RunRecord(
        run_id=spec.run_id,
        status=status,  # type: ignore[arg-type]
        spec=spec,
        params={name: spec.params.count(name) for name in PARAMS_CONVENTIONS},
        tokens=spec.tokens,
        flops={name: training_flops(spec.shape, spec.tokens, name) for name in FLOPS_CONVENTIONS},
        loss=3.0 if status == "ok" else None,
        bits_per_byte=1.5 if status == "ok" else None,
        train_loss=3.1,
        epochs=0.1,
        wall_s=0.1,
        train_s=0.1,
        tokens_per_s=1e4,
        mfu=None,
        attempts=attempt,
        device="cpu",
        threads=1,
        versions={},
        commit=None,
        reason="loss is NaN at step 3" if status == "diverged" else None,
    )


def attempt(run: RunDir, behaviour: str | None) -> bool:
    """Try one run. Returns False when it is not free, or done."""
    lease = run.acquire()
    if lease is None:
        return False
    with open(run.path / "tries.txt", "a") as file:
        file.write(f"{os.getpid()}\n")
    spec = run.spec()
    (lease.folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "tokens": spec.tokens // 2}) + "\n")
    if behaviour == "kill" or (behaviour == "kill-once" and lease.attempt == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "slow":
        time.sleep(30)
    if behaviour == "raise" or (behaviour == "raise-once" and lease.attempt == 1):
        run.write_failure(lease.attempt, "ValueError: as it\nwas told")
        lease.release()
        return True
    record(spec, lease.attempt, "diverged" if behaviour == "diverge" else "ok").write_once(run.record_json)
    lease.release()
    return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", type=Path)
    parser.add_argument("--runs")
    args, _ = parser.parse_known_args()
    behaviour = json.loads(os.environ.get("WORKER_BEHAVIOUR", "{}"))
    if "exit" in behaviour:
        print("error: the worker's own reason")
        sys.exit(behaviour["exit"])
    sweep = SweepDir(args.sweep)
    for run_id in args.runs.split(","):
        run = sweep.run(run_id)
        if run.waits_for() in args.runs.split(","):
            continue
        told = behaviour.get(str(run.spec().seed))
        while run.failures(os.environ[LAUNCH_VARIABLE]) < 3 and attempt(run, told):
            pass


if __name__ == "__main__":
    main()
