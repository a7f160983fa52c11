"""The loop heeds the watch's verdict between two steps, once, and none from before it started; and puts it into its metrics."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from scaling.spec import RunSpec
from scaling.sweepdir import RunDir
from train.engine import Host, checkpoint, train, verdict
from train.engine.signals import Interrupted
from train.engine.verdict import Said, Verdict

REASON = "training loss above its forecast"


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "LOOK_S", 0.0)


def write(path: Path, action: str, later_s: float = 1.0, window: int | None = 3, **more: object) -> None:
    """A verdict written `later_s` from now, whole at once."""
    reason = None if action == "continue" else REASON
    text = json.dumps({"action": action, "reason": reason, "window": window, **more})
    path.with_suffix(".new").write_text(text)
    at = time.time() + later_s
    os.utime(path.with_suffix(".new"), (at, at))
    path.with_suffix(".new").replace(path)


def speak_when_it_trains(run: RunDir, action: str, **more: object) -> None:
    """Write a verdict as soon as the run trains."""

    def speak() -> None:
        while not any(run.attempts.glob("*/metrics.jsonl")):
            time.sleep(0.005)
        write(run.verdict_json, action, **more)  # type: ignore[arg-type]

    threading.Thread(target=speak, daemon=True).start()


def test_what_is_asked_is_heeded_once_and_not_when_it_was_there_before(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    write(path, "stop", later_s=-10)
    heard = Verdict(path)
    assert heard.look() is None
    write(path, "stop", later_s=0.5, level=1.2)  # the same alarm, one window later
    assert heard.look() == Said(None, REASON, {"watch_action": "stop", "watch_reason": REASON, "watch_level": 1.2})
    write(path, "checkpoint", later_s=1)
    said = heard.look()
    assert said is not None
    assert said.asked == "checkpoint"
    assert heard.look() is None
    write(path, "checkpoint", later_s=2, window=7)  # another alarm
    said = heard.look()
    assert said is not None
    assert said.asked == "checkpoint"


def test_how_the_run_stands_is_told_in_its_row(tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    heard = Verdict(path)
    write(path, "continue", window=None, level=0.3, final_loss=2.7, final_interval_90=[2.6, 2.8])
    row = {"watch_action": "continue", "watch_level": 0.3, "watch_final_loss": 2.7}
    assert heard.look() == Said(None, None, {**row, "watch_final_low": 2.6, "watch_final_high": 2.8})


@pytest.mark.parametrize("text", ["{", "[]", '{"action": "dance"}', '{"action": ["stop"]}'])
def test_what_is_not_a_verdict_is_passed_over(tmp_path: Path, text: str) -> None:
    heard = Verdict(tmp_path / "verdict.json")
    heard.path.write_text(text)
    assert heard.look() is None
    write(heard.path, "stop", final_interval_90=[1])
    said = heard.look()
    assert said is not None
    assert said.asked == "stop"


def test_a_stop_ends_the_run_with_a_checkpoint_and_it_goes_on(
    tmp_path: Path, make_spec: Callable[..., RunSpec]
) -> None:
    spec = make_spec(steps=40)
    run = RunDir(tmp_path / "run")
    run.create(spec)
    speak_when_it_trains(run, "stop")
    with pytest.raises(Interrupted, match=rf"stopped at step \d+ of 40.*the watch asked for it: {REASON}"):
        train(spec, run)
    assert run.record() is None
    assert run.metrics()[-1]["watch_action"] == "stop"
    again = train(spec, run)
    assert again.status == "ok"
    plain = train(spec, RunDir(tmp_path / "plain"))
    assert again.loss == plain.loss


def test_a_checkpoint_is_kept_for_good_and_the_run_goes_on_as_if_it_had_not_been_asked(
    tmp_path: Path, make_spec: Callable[..., RunSpec], wandb_records: Callable[[Path], Iterator[bytes]]
) -> None:
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    spec, run = make_spec(steps=400), RunDir(tmp_path / "sweep" / "runs" / "run")
    run.create(spec)
    speak_when_it_trains(run, "checkpoint", final_loss=2.5)
    record = train(spec, run, Host(wandb="offline"))
    plain = RunDir(tmp_path / "sweep" / "runs" / "plain")
    assert record.loss == train(spec, plain).loss
    assert [row["train_loss"] for row in run.metrics()] == [row["train_loss"] for row in plain.metrics()]

    (row,) = (row for row in run.metrics() if "watch_action" in row)
    told = {"watch_action": "checkpoint", "watch_reason": REASON, "watch_final_loss": 2.5}
    assert told.items() <= row.items()
    (kept,) = checkpoint.kept(run.checkpoints, spec.steps)
    assert torch.load(kept, weights_only=True)["step"] == row["step"] < spec.steps
    assert len(checkpoint.newest(run.checkpoints)) == 2  # and the trained model

    (mirror,) = run.path.glob("attempts/0001/wandb/offline-run-*/*.wandb")
    logged = [pb.Record.FromString(item) for item in wandb_records(mirror)]
    histories = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in item.history.item}
                 for item in logged if item.WhichOneof("record_type") == "history"]  # fmt: skip
    (mirrored,) = (history for history in histories if "watch_action" in history)
    assert {**told, "step": row["step"]}.items() <= mirrored.items()
    assert len(histories) == spec.steps
