"""One rank of the parity tests: parallel_worker.py CASES_JSON OUT_JSON; rank 0 writes what each case came to.

A case: {"name", "spec", "layout", "start": checkpoint to go on from or null, "steps", "save": where to or null}.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from scaling.errors import InputError
from scaling.spec import RunSpec
from train.data.shards import Corpus
from train.engine import Host
from train.engine.parallel.world import World, find_world, join, leave
from train.engine.trainer import Trainer


def run_case(case: dict[str, Any], world: World | None) -> dict[str, Any]:
    """Steps of one case: losses, gradient norms, held-out loss at the end; or why it was refused."""
    spec = RunSpec.from_dict(case["spec"])
    corpus = Corpus.open(str(spec.data.digest))
    try:
        trainer = Trainer(
            spec,
            corpus,
            Host(
                layout=case["layout"],
                micro_batch_tokens=128,
                recompute=case.get("recompute", "none"),
                compile=case.get("compile", "none"),
            ),
            world,
        )
        if case.get("start"):
            assert trainer.restore([Path(path) for path in case["start"]], spec.run_id)
    except InputError as error:
        return {"name": case["name"], "refused": str(error)}
    first = trainer.progress.step
    rows = [trainer.step(*trainer.loader.batch(step)) for step in range(first, first + case["steps"])]
    if case.get("save"):
        trainer.save(Path(case["save"]))
        trainer.writer.wait()
    losses, norms = [row["train_loss"] for row in rows], [row["grad_norm"] for row in rows]
    loads = [{name: value for name, value in row.items() if "expert" in name} for row in rows]
    held_out = trainer.evaluate()
    return {
        "name": case["name"],
        "first": first,
        "losses": losses,
        "norms": norms,
        "held_out": held_out,
        "loads": loads,
        "bias": {name: tensor.tolist() for name, tensor in trainer.state_dict()["model"].items() if "bias_E" in name},
    }


def main() -> None:
    torch.set_num_threads(1)
    world = find_world()
    assert world is not None
    join(world, "cpu")
    out = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        out.append(run_case(case, world))
        gc.collect()
    if world.leads:
        Path(sys.argv[2]).write_text(json.dumps(out))
    leave()


if __name__ == "__main__":
    warnings.simplefilter("error")  # as in pytest
    warnings.filterwarnings("ignore", module="torch")
    main()
