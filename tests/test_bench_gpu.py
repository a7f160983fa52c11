"""bench/gpu.py: the CPU path of every row, a row that fails, kernel families, and the small sweep with its larger run."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scaling.records import Forecast
from scaling.sweepdir import RunDir, SweepDir

ROOT = Path(__file__).resolve().parents[1]


def bench(*args: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        **({"ISOFLOP_CACHE": str(cache)} if cache else {}),
    }
    command = [sys.executable, "bench/gpu.py", "--device", "cpu", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def on_path() -> Iterator[None]:
    """bench/ is in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        yield


@pytest.fixture(scope="module")
def measure_module(on_path: None) -> ModuleType:
    """bench/gpu_measure.py."""
    return importlib.import_module("gpu_measure")


@pytest.fixture(scope="module")
def rows_module(on_path: None) -> ModuleType:
    """bench/gpu_rows.py."""
    return importlib.import_module("gpu_rows")


def test_every_row_has_a_figure_or_says_why_not() -> None:
    done = bench()
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stdout[done.stdout.rindex("| model |") :].splitlines()[2:]
    rows = {cells[1].strip(): [cell.strip() for cell in cells] for cells in (row.split("|")[1:] for row in printed)}
    assert list(rows) == [
        *("plain", "CUDA graphs", "fp8", "compile=block", "2 processes", "3 stacked", "micro-batch 128")
    ]
    for setting in ("plain", "compile=block", "2 processes", "3 stacked", "micro-batch 128"):
        assert float(rows[setting][2].replace(",", "")) > 0, rows[setting]
    assert rows["plain"][3] == "1.00"
    assert all(part in rows["plain"][6] for part in ("data", "forward", "backward", "clip", "update"))
    assert "device cpu has none" in rows["CUDA graphs"][2]
    assert "cpu has no fp8 products" in rows["fp8"][2]
    split = next(line for line in done.stdout.splitlines() if line.startswith("| small | plain"))
    for family in ("matrix products", "attention", "optimizer and clipping"):
        assert f"{family} " in split


def test_rows_without_time_say_so() -> None:
    done = bench("--minutes", "0", "--compile", "none")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("not run: no time left") == 2 * 6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--models", "smal"], "unknown --models 'smal': did you mean 'small'?"),
        (["--compile", "half"], "unknown --compile 'half'"),
        (["--largest", "1e9"], "--largest and --set belong to --sweep DIR"),
        (["--sweep", "DIR", "--largest", "-1"], "--largest -1: must be positive"),
    ],
)
def test_bad_input(args: list[str], message: str, tmp_path: Path) -> None:
    done = bench(*(str(tmp_path / "out") if arg == "DIR" else arg for arg in args))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
def test_without_a_gpu() -> None:
    done = bench("--device", "cuda")
    assert done.returncode == 2
    assert "this machine has no GPU: give --device cpu" in done.stderr


def test_kernel_families(measure_module: ModuleType) -> None:
    def event(cat: str, name: str, ts: float, dur: float) -> dict[str, object]:
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 7}

    inside = [event("cpu_op", "aten::linear", 0, 100), event("cpu_op", "aten::mm", 10, 60)]
    split, busy = measure_module.kernel_families([*inside, event("cpu_op", "aten::add_", 100, 100)], 2)
    assert split == pytest.approx({"element-wise": 50e-6, "other": 20e-6, "matrix products": 30e-6})
    assert busy == pytest.approx(1.0)

    names = {
        "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "matrix products",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": "attention",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>": "optimizer and clipping",
        "triton_red_fused__to_copy_add_mul_rsqrt_3": "compiled",
        "void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add<c10::BFloat16>>": "element-wise",
        "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>": "copies and casts",
        "Memcpy HtoD (Pageable -> Device)": "copies and casts",
        "void at::native::reduce_kernel<512, 1, ReduceOp<float, SumOp>>": "norms, softmax, sums",
    }
    on_gpu = [event("kernel", name, 10 * n, 5) for n, name in enumerate(names)]
    split, busy = measure_module.kernel_families([*on_gpu, *inside], 1)
    expected: dict[str, float] = {}
    for family in names.values():
        expected[family] = expected.get(family, 0.0) + 5e-6
    assert split == pytest.approx(expected)
    assert busy == pytest.approx(40 / 75)


def test_a_row_that_dies_or_hangs_is_said(rows_module: ModuleType) -> None:
    def workers() -> Any:
        made = rows_module.Workers(1, "cpu")
        (process,) = made._processes
        return made, process

    dying, process = workers()
    process.kill()
    process.join()
    with pytest.raises(rows_module.RowError, match="its process died"):
        dying.call("name", limit_s=60.0)
    hanging, process = workers()
    with pytest.raises(rows_module.RowError, match="took longer than 0 s"):
        hanging.call("name", limit_s=0.01)
    assert not dying.alive
    assert not hanging.alive
    assert not process.is_alive()


@pytest.mark.slow
def test_a_sweep_forecasts_a_run_30_times_larger(tmp_path: Path) -> None:
    texts = Path(sysconfig.get_paths()["stdlib"]) / "[a-d]*.py"
    settings = ["data=text", f"data.path='{texts}'", "model.vocab_size=300", "eval.tokens=2048"]
    args = ["--sweep", str(tmp_path / "out"), "--largest", "1e9", "--set", *settings, "recipe.batch_multiplier=2"]
    done = bench(*args, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr[-3000:]
    records = SweepDir(tmp_path / "out" / "sweep").records()
    assert len(records) == 16
    forecast, record = (
        Forecast.read(tmp_path / "out" / "forecast.json"),
        RunDir(tmp_path / "out" / "flagship").record(),
    )
    assert record is not None
    assert record.run_id == forecast.spec.run_id
    assert forecast.spec.flops == pytest.approx(3e10, rel=0.05)
    assert forecast.extrapolation_ratio == pytest.approx(30, rel=0.05)
    sealed, trained = (tmp_path / "out" / name for name in ("forecast.json", "flagship/record.json"))
    assert sealed.stat().st_mtime_ns < trained.stat().st_mtime_ns
    assert f"forecast loss  {forecast.loss:.4f}" in done.stdout

    made = trained.stat().st_mtime_ns
    again = bench(*args, cache=tmp_path / "cache")
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("(done before)") == 3
    assert trained.stat().st_mtime_ns == made
