"""precision=auto: the rule, what it looks at, and that a sweep keeps the precision it has."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from scaling.cost import LONG_RUN_S, run_seconds
from scaling.errors import InputError
from scaling.grid import asks_auto, expand_grid
from scaling.hardware import find_device
from scaling.precision import WIDE, Precision, choose, choose_for, has_bf16_products, with_precision
from scaling.rounds import extent
from scaling.sweepdir import SweepDir

Cli = Callable[..., subprocess.CompletedProcess[str]]
LONG = ["model=base", "model.width=192", "tokens=2e7"]
CPU = find_device("cpu")


@pytest.mark.parametrize(
    ("device", "seconds", "width", "has_products", "chosen", "why"),
    [
        ("cuda", 1.0, 16, None, "bf16", "on a GPU"),
        ("cuda", 1e5, 512, False, "bf16", "on a GPU"),
        ("cpu", LONG_RUN_S + 1, WIDE, True, "bf16", "the processor has bf16 products"),
        ("cpu", LONG_RUN_S, WIDE, True, "fp32", "pays over 120 s"),
        ("cpu", 1e5, WIDE - 1, True, "fp32", f"pays from {WIDE} on"),
        ("cpu", 1e5, 512, False, "fp32", "no bf16 products"),
        ("cpu", 1e5, 512, None, "fp32", "not known here"),
    ],
)
def test_the_rule(
    device: str, seconds: float, width: float, has_products: bool | None, chosen: Precision, why: str
) -> None:
    precision, reason = choose(device, seconds, width, has_products)
    assert precision == chosen
    assert why in reason


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ("fpu avx2 avx512f avx512_bf16", True),
        ("fpu avx512f amx_bf16 amx_tile", True),
        ("fpu avx2 avx512f avx512_vnni", False),
    ],
)
def test_what_a_processor_has(flags: str, has: bool, tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: with avx512_bf16 in its name\nflags\t\t: {flags}\n")
    assert has_bf16_products(path) == has
    assert not has_bf16_products(tmp_path / "none")


def test_a_dry_run_says_what_was_chosen_and_why(cli: Cli) -> None:
    for settings, said in (
        (["+grid=demo"], "precision=fp32: the longest run takes about "),
        (["+grid=demo", "launcher.device=cuda"], "precision=bf16: the runs train on a GPU"),
        ([*LONG, "launcher=slurm"], "precision=fp32: the processors of the jobs are not known here"),
        ([*LONG, "launcher=slurm", "launcher.gpus_per_node=1"], "precision=bf16: the runs train on a GPU"),
    ):
        done = cli("scaling.sweep", *settings, "precision=auto", "dry_run=true")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(said)
    assert "precision=" not in cli("scaling.sweep", "+grid=demo", "dry_run=true").stdout


def test_this_machine_and_its_long_runs(tmp_path: Path) -> None:
    chosen, why = choose_for(expand_grid(LONG), SweepDir(tmp_path / "none"), "local", "cpu")
    assert chosen == ("bf16" if has_bf16_products() else "fp32")
    assert "bf16 products" in why


def test_what_was_chosen_is_the_runs_own_precision() -> None:
    assert asks_auto(["+grid=demo", "precision=auto"])
    assert not asks_auto(["+grid=demo"])
    plain = {spec.run_id for spec in expand_grid(["+grid=demo"]).specs}
    for precision, same in (("fp32", True), ("bf16", False)):
        argv = with_precision(["+grid=demo", "precision=auto"], precision)
        specs = expand_grid(argv).specs
        assert {spec.precision for spec in specs} == {precision}
        assert ({spec.run_id for spec in specs} == plain) == same


def test_a_sweep_that_exists_keeps_its_precision(sweep_with: Callable[..., tuple[int, SweepDir]]) -> None:
    """Also where a machine with a GPU goes on with it; one with runs in both asks."""
    _, sweep = sweep_with()
    assert choose_for(expand_grid(LONG), sweep, "local", "cuda")[0] == "fp32"
    sweep_with(None, "precision=bf16")
    with pytest.raises(InputError, match="has runs in bf16 and fp32: say which, precision=bf16"):
        choose_for(expand_grid(LONG), sweep, "local", "cuda")


def test_a_sweep_goes_on_in_the_precision_it_was_planned_with(
    sweep_with: Callable[..., tuple[int, SweepDir]], settings: list[str], cli: Cli
) -> None:
    _, sweep = sweep_with(None, "precision=bf16")
    done = cli("scaling.sweep", *settings, "precision=auto", f"sweep.dir={sweep.path}", "dry_run=true")
    assert done.stdout.startswith(f"precision=bf16: that of the runs that {sweep.path} has")


def test_auto_is_no_precision_of_one_run() -> None:
    for settings in (["precision=auto,fp32", "flops=1e10"], ["precision=auto", "flops=1e10"]):
        with pytest.raises(InputError, match="for all runs of a sweep alike"):
            expand_grid(settings)


def test_an_adaptive_sweep_is_judged_by_what_its_budget_buys() -> None:
    grid = ["+grid=adaptive", "target_flops=1e17"]
    (short, narrow), (long, wide) = (
        extent(expand_grid([*grid, f"sweep.budget_flops={budget}"]), CPU) for budget in ("1e12", "1e16")
    )
    assert long == pytest.approx(1e4 * short)
    assert wide == pytest.approx(10 * narrow)
    specs = expand_grid(["+grid=demo"]).specs
    longest, width = extent(expand_grid(["+grid=demo"]), CPU)
    assert longest == max(run_seconds(spec, CPU) for spec in specs)
    assert 24 < width < 48
