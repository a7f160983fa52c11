"""The energy meter: packages are added, parts are not counted twice, a counter that began anew is followed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train.engine.energy import EnergyMeter


def write_zone(folder: Path, name: str, microjoules: int, most: int = 10**9) -> None:
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{microjoules}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{most}\n")


def test_packages_add_up_and_their_parts_do_not(tmp_path: Path) -> None:
    for name, start in (("intel-rapl:0", 5_000_000), ("intel-rapl:0:0", 1_000_000), ("intel-rapl:1", 999_000_000)):
        write_zone(tmp_path, name, start)
    meter = EnergyMeter(torch.device("cpu"), tmp_path)
    assert meter.joules() == 0
    write_zone(tmp_path, "intel-rapl:0", 7_500_000)
    write_zone(tmp_path, "intel-rapl:0:0", 2_000_000)
    write_zone(tmp_path, "intel-rapl:1", 1_000_000)  # past its largest value, 1000 J
    assert meter.joules() == pytest.approx(2.5 + 2.0)


def test_a_device_that_does_not_tell_has_none(tmp_path: Path) -> None:
    assert EnergyMeter(torch.device("cpu"), tmp_path / "none").joules() is None
    write_zone(tmp_path, "intel-rapl:0", 1)
    meter = EnergyMeter(torch.device("cpu"), tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    assert meter.joules() is None
