"""µP and CompleteP: how far training moves activations does not depend on width, or on depth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from scaling.errors import InputError
from scaling.grid import expand_grid
from scaling.shape import ModelShape, ShapeFamily
from scaling.spec import OptimSpec, RunSpec
from scaling.sweepdir import RunDir
from scaling.transfer import Multipliers, Transfer
from train.engine import Host, train
from train.engine.optim import Optimizers
from train.model.decoder import UNSCALED, Decoder, folded
from train.trained import load_trained

Kind = Literal["mup", "completep"]
VOCABULARY, USED, STEPS = 64, 8, 4


def shape_of(width: int, depth: int) -> ModelShape:
    """Two heads at every width, so that the size of a head grows too."""
    return ShapeFamily(vocab_size=VOCABULARY, seq_len=16, depth=depth, n_heads=2).shape(width)


def multipliers(kind: Kind | None, shape: ModelShape) -> Multipliers:
    """From a base of width 32, depth 2."""
    return UNSCALED if kind is None else Transfer(kind, 32, 2, 16).multipliers(shape)


@cache
def moved(width: int, depth: int, kind: Kind | None, optim: Literal["adamw", "muon"]) -> dict[str, float]:
    """Root mean square of what four steps change of each coordinate: the stream after the last layer, the logits."""
    shape = shape_of(width, depth)
    by = multipliers(kind, shape)
    model = Decoder(shape, multipliers=by)
    model.initialise(0)
    optimizers = Optimizers(model, OptimSpec(optim, 0.01), "fp32", multipliers=by)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, USED, (STEPS + 1, 16, 17), generator=generator)
    streams: list[torch.Tensor] = []
    model.model.layers[-1].register_forward_hook(lambda layer, args, out: streams.append(out.detach()))
    with torch.no_grad():
        before = model(ids[-1, :, :-1])
    for batch in ids[:-1]:
        (model.loss(batch[:, :-1], batch[:, 1:]) / batch[:, 1:].numel()).backward()
        optimizers.step(1.0)
    with torch.no_grad():
        after = model(ids[-1, :, :-1])
    changes = {"stream": streams[-1] - streams[0], "logits": after - before}
    return {name: float(change.square().mean().sqrt()) for name, change in changes.items()}


def slope(sizes: list[int], values: list[float]) -> float:
    """Of log value over log size, between the ends."""
    return math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])


WIDTHS, DEPTHS = [32, 64, 128, 256], [2, 4, 8, 16]


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_coordinates_move_alike_at_every_width_under_mup_alone(optim: Literal["adamw", "muon"]) -> None:
    plain = [moved(width, 2, None, optim) for width in WIDTHS]
    scaled = [moved(width, 2, "mup", optim) for width in WIDTHS]
    assert plain[0] == scaled[0]  # the base
    for name in ("stream", "logits"):
        assert abs(slope(WIDTHS, [change[name] for change in scaled])) < 0.2, name
        assert slope(WIDTHS, [change[name] for change in plain]) > 0.2, name
    assert max(slope(WIDTHS, [change[name] for change in plain]) for name in plain[0]) > 0.5


def test_coordinates_move_alike_at_every_depth_under_completep_alone() -> None:
    scaled, mup = ([moved(32, depth, kind, "adamw")["stream"] for depth in DEPTHS] for kind in ("completep", "mup"))
    assert scaled[0] == mup[0]
    assert abs(slope(DEPTHS, scaled)) < 0.2
    assert slope(DEPTHS, mup) > 0.5
    both = [moved(width, depth, "completep", "adamw")["stream"] for width, depth in ((32, 2), (128, 8))]
    assert both[1] == pytest.approx(both[0], rel=0.5)


def test_muon_is_not_made_larger_by_depth_under_completep() -> None:
    scaled, mup = ([moved(32, depth, kind, "muon")["stream"] for depth in DEPTHS] for kind in ("completep", "mup"))
    assert slope(DEPTHS, scaled) < 0.1 < slope(DEPTHS, mup)


@pytest.mark.parametrize("change", [{}, {"qk_norm": False}, {"tied_embeddings": True}])
def test_folded_weights_give_the_same_logits_without_multipliers(change: dict[str, Any]) -> None:
    shape = dataclasses.replace(shape_of(64, 4), **change)
    by = multipliers("completep", shape)
    model = Decoder(shape, multipliers=by)
    model.initialise(3)
    plain = Decoder.of_weights(shape, folded(model.state_dict(), by))
    ids = torch.arange(32).view(2, 16)
    torch.testing.assert_close(plain(ids), model(ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(Decoder.of_weights(shape, model.state_dict())(ids), model(ids), rtol=1e-2)


def test_a_run_with_a_transfer_trains_resumes_and_is_loaded(
    make_spec: Callable[..., RunSpec], tmp_path: Path
) -> None:
    spec = make_spec(steps=6, optim="adamw", transfer=Transfer("completep", 8, 1, 4))
    run = RunDir(tmp_path / "run")
    record = train(spec, run, Host())
    trained = load_trained(run.path)
    assert record.loss is not None
    run.record_json.unlink()
    assert train(spec, run, Host()).loss == record.loss  # evaluated again, from the last checkpoint
    model = Decoder(spec.shape, multipliers=spec.multipliers)
    model.initialise(0)
    ids = torch.arange(64).view(2, 32)
    assert set(trained.weights) == set(model.state_dict())
    assert model.loss(ids, ids) > 0
    groups = Optimizers(model, spec.optim, "fp32", multipliers=spec.multipliers).adamw.param_groups
    decays = sorted({group["weight_decay"] for group in groups})
    assert decays == [0.0, spec.optim.weight_decay, 2 * spec.optim.weight_decay]


def test_the_recipe_scales_from_its_base_and_leaves_other_runs_alone() -> None:
    plain = ["model=smoke", "tokens=65536", "recipe=fixed", "recipe.peak_lr=.01", "recipe.batch_tokens=1024"]
    transfer = ["recipe.transfer=completep", "recipe.base_width=16", "recipe.base_depth=1"]
    (spec,) = expand_grid([*plain, *transfer, "model.width=32"]).specs
    assert spec.transfer == Transfer("completep", 16, 1, 8)
    assert spec.multipliers.adamw_lr == spec.multipliers.branch == 0.5
    assert spec.multipliers.layer_eps == 0.25
    assert RunSpec.from_dict(spec.to_dict()) == spec
    (other,) = expand_grid([*plain, "model.width=32"]).specs
    assert other.transfer is None
    assert "transfer" not in other.to_dict()
    assert other.run_id != spec.run_id
    for change, says in (
        (["recipe=steplaw", "recipe.transfer=mup", "recipe.base_width=16"], "tuned there"),
        ([*plain, "recipe.transfer=mup"], "give recipe.base_width"),
        ([*plain, "recipe.base_width=16"], "go with recipe.transfer"),
        ([*plain, "recipe.transfer=completep", "recipe.base_width=16"], "give recipe.base_depth"),
    ):
        with pytest.raises(InputError, match=says):
            expand_grid(["model=smoke", "tokens=65536", *change])
