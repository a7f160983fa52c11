"""Every layout and every pair of layouts trains what one process trains, and reads what the others saved."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scaling.ranks import run_ranks
from scaling.records import DataManifest
from scaling.shape import Experts, ModelShape
from scaling.spec import DataSpec, EvalSpec, OptimSpec, RunSpec, ScheduleSpec
from scaling.sweepdir import RunDir
from train.data.loader import Loader
from train.data.shards import Corpus
from train.data.tokenizer import EOS
from train.engine import Host, checkpoint
from train.engine.trainer import Trainer
from train.trained import load_run

sys.path.insert(0, str(Path(__file__).parent))
from parallel_worker import run_case

Specs = Callable[[str], RunSpec]
STEPS = 5
SAVED = 3
TWO = {
    "fsdp": "data=2",
    "zero-1": "data=2,shard=optimizer",
    "hsdp": "data=2,replicas=2",
    "tensor": "tensor=2",
    "context": "context=2",
    "1f1b": "pipeline=2",
    "interleaved": "pipeline=2,chunks=2,schedule=interleaved",
    "zero bubble": "pipeline=2,chunks=2,schedule=zero_bubble",
}
FOUR = {
    "hsdp × 2": "data=4,replicas=2",
    "fsdp × tensor": "tensor=2",
    "fsdp × context": "context=2",
    "fsdp × 1f1b": "pipeline=2",
    "tensor × context": "tensor=2,context=2",
    "tensor × 1f1b": "tensor=2,pipeline=2",
    "context × 1f1b": "context=2,pipeline=2",
}
OF_KIND = {
    4: {
        "fsdp × tensor, muon": "tensor=2",
        "fsdp × tensor, tied": "tensor=2",
        "hsdp × 2, experts": "data=4,replicas=2",
        "fsdp × tensor, experts": "tensor=2",
        "hsdp × 2, muon with experts": "data=4,replicas=2",
        "fsdp × tensor, muon with experts": "tensor=2",
        "context × 1f1b, experts": "context=2,pipeline=2",
        "tensor × context, balanced by a loss": "tensor=2,context=2",
        "tensor × 1f1b, masked": "tensor=2,pipeline=2",
    },
    2: {
        "zero bubble, muon": TWO["zero bubble"],
        "fsdp, experts": "",
        "fsdp, muon with experts": "",
        "zero-1, muon with experts": TWO["zero-1"],
        "fsdp, balanced by a loss": "",
        "fsdp, masked": "",
        "context, masked": "context=2",
    },
}
"""Other runs, by what their names end with; the rest train the same run with AdamW."""
REFUSED = {
    "data=3": "is of 3 ranks, there are 2",
    "tensor=2,micro_batch=3": "micro_batch 3 does not divide 8",
    "pipeline=2,chunks=4,schedule=interleaved": "8 pipeline stages for 4 layers",
    "tensor=2,recompute=full": "their collectives are not compiled: use compile=none",
    "pipeline=2": "balance=loss need pipeline = 1",
}
REFUSED_OF = {"tensor=2,recompute=full": {"compile": "block"}, "pipeline=2": {"optim": "balanced by a loss"}}


@pytest.fixture(scope="module")
def make_spec_module(manifest: DataManifest, text_glob: str, corpus_cache: Path) -> Specs:
    """RunSpecs of the parity cases by optimizer; the cache is set for this module and its children."""
    os.environ["ISOFLOP_CACHE"] = str(corpus_cache)
    shape = ModelShape(32, 4, 4, 64, manifest.vocab_size, 32, n_kv_heads=2)

    def make(optim: str) -> RunSpec:
        return RunSpec(
            shape=shape,
            data=DataSpec("text", path=text_glob, digest=manifest.digest),
            tokens=40 * 256,
            batch_tokens=256,
            optim=OptimSpec(optim, 0.01, z_loss=1e-4),  # type: ignore[arg-type]
            schedule=ScheduleSpec("wsd", warmup_tokens=5 * 256),
            eval=EvalSpec(1024, points=3),
        )

    return make


def _seed_with_an_end(spec: RunSpec) -> int:
    """The first seed whose first batch has a document's end within a sequence."""
    corpus = Corpus.open(str(spec.data.digest))
    loaders = ((seed, Loader.of(dataclasses.replace(spec, seed=seed), corpus)) for seed in itertools.count())
    return next(seed for seed, loader in loaders if (loader.batch(0)[0][:, :-1] == EOS).any())


@pytest.fixture(scope="module")
def results(make_spec_module: Specs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case by name: one process here, then four ranks, then two, each started once."""
    folder = tmp_path_factory.mktemp("parity")
    specs = {name: make_spec_module(name).to_dict() for name in ("adamw", "muon")}
    tied = make_spec_module("adamw")
    specs["tied"] = dataclasses.replace(tied, shape=dataclasses.replace(tied.shape, tied_embeddings=True)).to_dict()
    unmasked = dataclasses.replace(tied, seed=_seed_with_an_end(tied))
    specs["unmasked"] = unmasked.to_dict()
    masked = dataclasses.replace(unmasked.data, document_mask=True)
    specs["masked"] = dataclasses.replace(unmasked, data=masked).to_dict()
    for kind, balance in (("experts", "bias"), ("balanced by a loss", "loss")):
        experts = Experts(4, 2, n_shared=1, granularity=2, balance=balance, balance_rate=0.01)  # type: ignore[arg-type]
        specs[kind] = dataclasses.replace(tied, shape=dataclasses.replace(tied.shape, experts=experts)).to_dict()

    with_experts = RunSpec.from_dict(specs["experts"])
    specs["muon with experts"] = dataclasses.replace(with_experts, optim=make_spec_module("muon").optim).to_dict()

    def case(name: str, layout: str, optim: str = "adamw", **fields: Any) -> dict[str, Any]:
        return {"name": name, "spec": specs[optim], "layout": layout, "steps": STEPS, **fields}

    whole = [case(f"one process, {optim}", "", optim) for optim in specs]
    whole.append(case("saved by one", "", "muon", steps=SAVED, save=str(folder / "one")))
    whole.append(case("experts saved by one", "", "experts", steps=SAVED, save=str(folder / "experts")))
    found = {c["name"]: run_case(c, None) for c in whole}
    by_one = [str(path) for path in checkpoint.newest(folder / "one")]
    later = {"steps": STEPS - SAVED, "optim": "muon"}
    experts = {"steps": STEPS - SAVED, "optim": "experts"}
    by_two = str(folder / "two" / f"step-{SAVED:09d}.pt")
    by_four = str(folder / "four" / f"step-{SAVED:09d}.pt")
    cases = {
        4: [
            *(case(name, layout) for name, layout in FOUR.items()),
            *(case(name, layout, name.split(", ")[1]) for name, layout in OF_KIND[4].items()),
            case("fsdp × tensor, recomputed", "tensor=2", recompute="full"),
            case("fsdp × 1f1b, recomputed", "pipeline=2", recompute="selective"),
            case("one → fsdp × tensor", "tensor=2", start=by_one, **later),
            case("saved by four", "tensor=2", "muon", steps=SAVED, save=str(folder / "four")),
            case("fsdp × tensor → tensor × 1f1b", "tensor=2,pipeline=2", start=[by_four], **later),
        ],
        2: [
            *(case(name, layout) for name, layout in TWO.items()),
            *(case(name, layout, name.split(", ")[1]) for name, layout in OF_KIND[2].items()),
            case("fsdp, compiled", "", compile="block"),
            case("1f1b, compiled", "pipeline=2", compile="block", recompute="selective"),
            case("experts saved by two", "", "experts", steps=SAVED, save=str(folder / "two")),
            case("one → fsdp, experts", "", start=[str(folder / "experts" / f"step-{SAVED:09d}.pt")], **experts),
            case("fsdp × tensor → context", "context=2", start=[by_four], **later),
            case("fsdp × tensor → fsdp", "", start=[by_four], **later),
            *(case(layout, layout, **REFUSED_OF.get(layout, {})) for layout in REFUSED),
            case("other tensors of one", "", "muon", start=[str(folder / "experts" / f"step-{SAVED:09d}.pt")]),
            case("other tensors of two", "", "muon", start=[by_two]),
        ],
    }
    for ranks, some in cases.items():
        asked, answer = folder / f"{ranks}.json", folder / f"{ranks}-out.json"
        asked.write_text(json.dumps(some))
        worker = str(Path(__file__).with_name("parallel_worker.py"))
        assert run_ranks([sys.executable, worker, str(asked), str(answer)], ranks) == 0
        found |= {out["name"]: out for out in json.loads(answer.read_text())}
    found["fsdp × tensor → one"] = run_case(case("", "", start=[by_four], **later), None)
    found["fsdp → one, experts"] = run_case(case("", "", start=[by_two], **experts), None)
    found["folder"] = {"path": str(folder)}
    return found


def reference(name: str) -> str:
    """The case of one process that a case of several ranks should equal."""
    of_kind = any(name in cases for cases in OF_KIND.values())
    return f"one process, {name.split(', ')[1] if of_kind else 'adamw'}"


def differences(found: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float, float]:
    """Largest |Δ| of the losses, of the gradient norms (over the norm where that is above 1), of the held-out loss."""
    at = slice(found["first"], found["first"] + len(found["losses"]))
    losses = max(abs(a - b) for a, b in zip(found["losses"], reference["losses"][at], strict=True))
    norms = max(abs(a - b) / max(1.0, b) for a, b in zip(found["norms"], reference["norms"][at], strict=True))
    return losses, norms, abs(found["held_out"] - reference["held_out"])


def test_every_layout_and_pair_is_one_process(
    results: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    two = [*TWO, *OF_KIND[2], "fsdp, compiled", "1f1b, compiled"]
    names = [*two, *FOUR, *OF_KIND[4], "fsdp × tensor, recomputed", "fsdp × 1f1b, recomputed"]
    rows = {name: differences(results[name], results[reference(name)]) for name in names}
    with capsys.disabled():
        print(f"\n{'layout':36} {'ranks':>5} {'|Δloss|':>9} {'|Δnorm|':>9} {'|Δheld-out|':>11}")
        for name, row in rows.items():
            print(f"{name:36} {2 if name in two else 4:5} {row[0]:9.1e} {row[1]:9.1e} {row[2]:11.1e}")
    plain, masked, unmasked = (results[f"one process, {kind}"]["losses"] for kind in ("adamw", "masked", "unmasked"))
    assert plain[0] > plain[-1]
    assert abs(masked[0] - unmasked[0]) > 1e-5
    assert {name: row for name, row in rows.items() if max(row) > 2e-6} == {}


@pytest.mark.parametrize(
    "name",
    [
        "one → fsdp × tensor",
        "fsdp × tensor → tensor × 1f1b",
        "fsdp × tensor → context",
        "fsdp × tensor → fsdp",
        "fsdp × tensor → one",
    ],
)
def test_a_checkpoint_goes_on_under_another_layout(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert results[name]["first"] == SAVED
    assert max(differences(results[name], results["one process, muon"])) <= 1e-6


@pytest.mark.parametrize("name", ["one → fsdp, experts", "fsdp → one, experts"])
def test_experts_go_on_with_their_routers_biases(name: str, results: dict[str, dict[str, Any]]) -> None:
    alone = results["one process, experts"]
    assert max(differences(results[name], alone)) <= 2e-6
    assert results[name]["bias"] == alone["bias"]


def test_load_of_the_experts_is_that_of_all_ranks(results: dict[str, dict[str, Any]]) -> None:
    alone = results["one process, experts"]
    assert any(value for bias in alone["bias"].values() for value in bias)
    assert alone["loads"][0]["expert_load_max"] > 1
    for name in ("fsdp, experts", "hsdp × 2, experts", "fsdp × tensor, experts", "context × 1f1b, experts"):
        for row, of_one in zip(results[name]["loads"], alone["loads"], strict=True):
            assert row == pytest.approx(of_one)
        assert results[name]["bias"].items() <= alone["bias"].items()


@pytest.mark.parametrize(("layout", "message"), REFUSED.items())
def test_layouts_that_do_not_divide(layout: str, message: str, results: dict[str, dict[str, Any]]) -> None:
    assert message in results[layout]["refused"]


@pytest.mark.parametrize("name", ["other tensors of one", "other tensors of two"])
def test_a_checkpoint_of_another_shape(
    name: str, results: dict[str, dict[str, Any]], make_spec_module: Specs
) -> None:
    assert re.fullmatch(
        f"checkpoint of run [0-9a-f]{{16}} in the folder of run {make_spec_module('muon').run_id}: delete it",
        results[name]["refused"],
    )


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_part_is_detected_and_the_checkpoint_before_is_used(
    damage: str,
    results: dict[str, dict[str, Any]],
    make_spec_module: Specs,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = Path(results["folder"]["path"]) / "four" / f"step-{SAVED:09d}.pt"
    shutil.copytree(made, tmp_path / "step-000000003.pt")
    shutil.copytree(made, tmp_path / "step-000000004.pt")
    part = max((tmp_path / "step-000000004.pt").glob("*.distcp"))
    content = part.read_bytes()
    if damage == "missing":
        part.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        part.write_bytes(content[:-1] if damage == "truncated" else changed)
    spec = make_spec_module("muon")
    trainer = Trainer(spec, Corpus.open(str(spec.data.digest)), Host())
    assert trainer.restore(checkpoint.newest(tmp_path), spec.run_id)
    assert (
        f"step-000000004.pt cannot be read (ValueError('{part.name} is not what was written'))"
        in capfd.readouterr().err
    )


def test_what_four_ranks_saved_is_a_trained_model(
    results: dict[str, dict[str, Any]], make_spec_module: Specs, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    run.create(make_spec_module("muon"))
    name = f"step-{SAVED:09d}.pt"
    shutil.copytree(Path(results["folder"]["path"]) / "four" / name, run.checkpoints / name)
    weights = load_run(run.path).weights
    one = checkpoint.load_latest(Path(results["folder"]["path"]) / "one")
    assert one is not None
    assert weights.keys() == one["model"].keys()
    assert all(torch.allclose(weights[name], one["model"][name], atol=1e-5) for name in weights)
