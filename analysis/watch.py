"""ENTRY python -m analysis.watch RUN: a run in progress against its sealed forecast, until it ends or leaves its band."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.decide.alarm import State, alarm_limit, assess
from analysis.show.live import write_page
from scaling.cost import training_cost
from scaling.errors import InputError, run_command
from scaling.files import read_json, write_json
from scaling.hardware import Device, find_device
from scaling.records import Forecast
from scaling.sweepdir import RunDir
from scaling.text import readable_time

ACTIONS = ("warn", "checkpoint", "stop")
_RECENT = 50
"""Rows whose median speed is the run's."""
_HELP = """What is watched, in equal windows of the run: training loss, gradient norm, and the loss's scatter between steps, each against
what the sweep's runs did at the same point. A window's deviation, given those before it, is standardised; their sums since every
possible onset are compared with what a lasting shift would leave (CUSUM for a shift of unknown size, all three together).
--false-alarm is the probability that a sound run raises an alarm at any time.

verdict.json in the run's folder says how it stands, anew with each full window, and what to do; the run reads it between two
steps, and puts it into its metrics.jsonl (watch_action, watch_level, watch_final_loss and more) and, where it logs there, wandb:
  warn         goes on (default)       checkpoint   keeps a checkpoint for good and goes on       stop   writes one and stops
The same train.flagship command goes on after a stop: an alarm that verdict.json holds already is not raised again.

examples:
  python -m analysis.watch out/fit/flagship --html out/fit/watch.html
  python -m analysis.watch out/fit/flagship --on-alarm stop --device h100 --devices 256"""


@dataclass(frozen=True)
class Pace:
    """Speed, time and money."""

    tokens: int
    tokens_per_s: float
    remaining_s: float
    planned_tokens_per_s: float | None
    spent_usd: float | None
    remaining_usd: float | None


def pace(
    forecast: Forecast, rows: list[dict[str, Any]], device: Device | None, devices: int, planned: float | None
) -> Pace:
    """Where a run stands, by its last rows."""
    recent = sorted(r["tokens_per_s"] for r in rows[-_RECENT:] if r.get("tokens_per_s"))
    rate = recent[len(recent) // 2] if recent else float("nan")
    tokens = int(rows[-1]["tokens"])
    left_s = (forecast.spec.tokens - tokens) / rate
    spent = remaining = None
    if device is not None:
        price = device.usd_per_hour[0] * devices / 3600
        spent, remaining = tokens / rate * price, left_s * price
        if planned is None:
            hours = training_cost(forecast.spec.flops, device, devices, dtype=forecast.spec.precision).gpu_hours
            planned = forecast.spec.tokens / (hours / devices * 3600)
    return Pace(tokens, rate, left_s, planned, spent, remaining)


def verdict(state: State, on_alarm: str, step: int) -> dict[str, Any]:
    """The object of verdict.json."""
    return {
        "schema_version": 1,
        "action": on_alarm if state.alarm else "continue",
        "reason": str(state.alarm) if state.alarm else None,
        "step": step,
        "window": state.alarm.window if state.alarm else None,
        "windows": state.windows,
        "level": state.level,
        "final_loss": state.final_loss,
        "final_interval_90": list(state.final_interval_90),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def line(forecast: Forecast, state: State, at: Pace, rows: list[dict[str, Any]]) -> str:
    """One line for the terminal."""
    low, high = state.final_interval_90
    planned = f" ({at.tokens_per_s / at.planned_tokens_per_s:.0%} of plan)" if at.planned_tokens_per_s else ""
    money = f", {at.spent_usd:,.2f} + {at.remaining_usd:,.2f} USD" if at.spent_usd is not None else ""
    parts = [
        f"{at.tokens / forecast.spec.tokens:6.1%}",
        f"loss {rows[-1]['train_loss']:.3f}",
        f"heading for {state.final_loss:.4f} ({low:.4f} – {high:.4f}; sealed {forecast.loss:.4f})",
        f"{at.tokens_per_s:,.0f} tokens/s{planned}, {readable_time(at.remaining_s)} left{money}",
        f"ALARM: {state.alarm}" if state.alarm else "within its band" if state.windows else "no window full yet",
    ]
    return "  ".join(parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m analysis.watch",
        description="Watch a run against its sealed forecast: alarm, final loss, throughput, time and money left.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run's folder")
    add("--forecast", type=Path, help="default: forecast.json in the run's folder, or beside it")
    add("--on-alarm", choices=ACTIONS, default="warn", help="what the run is told to do (default warn)")
    add("--false-alarm", type=float, default=0.05, metavar="P", help="of a whole sound run (default .05)")
    add("--every", type=float, default=5.0, metavar="S", help="seconds between two looks (default 5)")
    add("--once", action="store_true", help="look once and end")
    add(
        "--html",
        type=Path,
        metavar="FILE",
        help="a page that reloads itself (default: watch.html in the run's folder)",
    )
    add("--device", metavar="NAME", help="price time and money, and plan the throughput, for this device")
    add("--devices", type=int, default=1, metavar="K", help="how many (default 1)")
    add(
        "--planned-tokens-per-s",
        type=float,
        metavar="R",
        help="throughput of the plan, where it was planned with a layout",
    )
    add("--json", metavar="-", choices=["-"], help="- : print verdict.json's object of the last look, nothing else")
    return parser


def main(argv: list[str]) -> int:
    """Look until the run has ended. Exit status 1 after an alarm."""
    args = _parser().parse_args(argv)
    if not 0 < args.false_alarm < 1:
        raise InputError(f"--false-alarm {args.false_alarm:g}: a probability between 0 and 1")
    if not args.every > 0 or args.devices < 1:
        raise InputError(f"--every {args.every:g}, --devices {args.devices}: must be positive")
    run = RunDir(args.run)
    forecast = Forecast.read(_forecast_of(args.run, args.forecast))
    if not run.spec_json.exists():
        raise InputError(f"{args.run} is not a run's folder: it has no spec.json")
    if run.spec().forecast_id != forecast.spec.forecast_id:
        raise InputError(
            f"run {run.spec().run_id} is not the forecast's {forecast.spec.run_id}: give its own --forecast"
        )
    if not forecast.channels:
        raise InputError(
            "this forecast has no expected path (the sweep's metrics were not at hand when it was made): only the end "
            "point can be compared, by python -m analysis.postmortem"
        )
    device = find_device(args.device) if args.device else None
    said = read_json(run.verdict_json, "verdict") if run.verdict_json.exists() else {}
    stopped = False
    limit = alarm_limit(forecast, args.false_alarm)
    while True:
        ended = run.record_json.exists()
        rows = [row for row in run.metrics() if "train_loss" in row]
        if rows:
            state = assess(forecast, rows, args.false_alarm, limit)
            at = pace(forecast, rows, device, args.devices, args.planned_tokens_per_s)
            new = verdict(state, args.on_alarm, int(rows[-1]["step"]))
            is_raised = any(new[key] != said.get(key) for key in ("action", "window"))
            if is_raised or new["windows"] != said.get("windows"):
                write_json(run.verdict_json, new)
            stopped = is_raised and new["action"] == "stop"
            said = new
            write_page(args.html or run.path / "watch.html", forecast, rows, state, line(forecast, state, at, rows))
            if not args.json:
                print(line(forecast, state, at, rows), flush=True)
        if ended or args.once or stopped:
            break
        time.sleep(args.every)
    if args.json:
        print(json.dumps(said))
    elif not rows:
        print(f"{args.run}: no step yet", file=sys.stderr)
    return 1 if said.get("reason") else 0


def _forecast_of(run: Path, given: Path | None) -> Path:
    places = [given] if given else [run / "forecast.json", run.resolve().parent / "forecast.json"]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise InputError(f"no forecast at {' or '.join(map(str, places))}: name it with --forecast PATH")
    return found


if __name__ == "__main__":
    run_command(main)
