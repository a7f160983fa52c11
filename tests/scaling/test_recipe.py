"""Recipes: published values, roundings, hand-given values, the measured law."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from scaling.accounting import count_params, flops_per_token
from scaling.errors import InputError
from scaling.recipe import DEEPSEEK, PORIAN, PUBLISHED, STEPLAW, Recipe, read_law, recipe_from_dict
from scaling.shape import ModelShape

SHAPE = ModelShape(width=64, depth=4, n_heads=4, d_ff=168, vocab_size=512, seq_len=128)
PARAMS = count_params(SHAPE)


def at(recipe: Recipe, tokens: float):  # type: ignore[no-untyped-def]
    return recipe.hyperparameters(PARAMS, tokens, tokens * flops_per_token(SHAPE).train, SHAPE)


def test_step_law_at_its_own_scale() -> None:
    """η(1e9, 1e11) and B(1e11), from the formula by logarithms."""
    assert math.isclose(
        STEPLAW.peak_lr(1e9, 1e11, 0.5), 10 ** (math.log10(1.79) - 0.713 * 9 + 0.307 * 11), rel_tol=1e-12
    )
    assert math.isclose(STEPLAW.batch_tokens(1e9, 1e11, 0.5), 0.58 * 10 ** (0.571 * 11), rel_tol=1e-12)


def test_deepseek_67b() -> None:
    """The paper's 67B model on 2T tokens was trained at 3.2e-4 and 4608 sequences of 4096."""
    flops = 6 * 67e9 * 2e12
    assert math.isclose(DEEPSEEK.peak_lr(67e9, 2e12, flops), 3.2e-4, rel_tol=0.01)
    assert math.isclose(DEEPSEEK.batch_tokens(67e9, 2e12, flops), 4608 * 4096, rel_tol=0.03)


def test_porian_batch_is_160_sequences_at_108m() -> None:
    assert math.isclose(PORIAN.batch_tokens(108e6, 1, 1), 160 * 2048, rel_tol=1e-12)
    hyper = at(Recipe("porian"), 20e6)
    assert hyper.warmup_tokens == PARAMS.body_head  # warm-up tokens = N
    assert hyper.beta2 == 0.99
    assert math.isclose(hyper.peak_lr, 3.7 * PARAMS.body_head**-0.36)


def test_porian_warmup_is_cut_in_short_runs() -> None:
    assert at(Recipe("porian"), 400_000).warmup_tokens == 100_000


@pytest.mark.parametrize("name", sorted(PUBLISHED))
@pytest.mark.parametrize("tokens", [1e4, 1e6, 1e8, 1e10])
def test_batch_is_whole_sequences_and_leaves_enough_steps(name: str, tokens: float) -> None:
    hyper = at(Recipe(name, min_steps=50), tokens)  # type: ignore[arg-type]
    assert hyper.batch_tokens % SHAPE.seq_len == 0
    assert hyper.batch_tokens >= SHAPE.seq_len
    assert hyper.batch_tokens == SHAPE.seq_len or tokens / hyper.batch_tokens >= 50


def test_multipliers() -> None:
    one, two = at(Recipe("steplaw"), 1e8), at(Recipe("steplaw", lr_multiplier=2, batch_multiplier=2), 1e8)
    assert math.isclose(two.peak_lr, 2 * one.peak_lr)
    assert abs(two.batch_tokens - 2 * one.batch_tokens) <= SHAPE.seq_len


def test_values_given_by_hand_win() -> None:
    hyper = at(
        Recipe(
            "steplaw", peak_lr=0.02, batch_tokens=1024, warmup_tokens=7, weight_decay=0.0, beta2=0.9, lr_multiplier=3
        ),
        1e6,
    )
    assert (hyper.peak_lr, hyper.batch_tokens, hyper.warmup_tokens) == (0.02, 1024, 7)
    assert (hyper.weight_decay, hyper.beta2) == (0.0, 0.9)


def test_fixed_needs_its_values() -> None:
    with pytest.raises(InputError, match=r"recipe\.peak_lr"):
        Recipe("fixed")
    assert at(Recipe("fixed", peak_lr=0.01, batch_tokens=512), 1e6).batch_tokens == 512


LAW = {
    "peak_lr": {"coefficient": 2.0, "n_exponent": -0.5, "d_exponent": 0.0, "interval": [1, 3]},
    "batch_tokens": {"coefficient": 1.0, "d_exponent": 0.5},
    "params": "body_head",
    "source": "sweeps/lr",
    "n_range": [1e4, 1e5],
    "d_range": [1e5, 1e6],
    "checks": [1, 2],
}


def test_measured_law_from_file_survives_the_plan(tmp_path: Path) -> None:
    """The law travels inside the plan's dictionary: the file may change or vanish afterwards."""
    path = tmp_path / "law.json"
    path.write_text(json.dumps(LAW))
    recipe = recipe_from_dict({"name": "measured", "path": str(path)})
    path.unlink()
    again = recipe_from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    hyper = at(again, 1e6)
    assert math.isclose(hyper.peak_lr, 2.0 * PARAMS.body_head**-0.5)
    assert hyper.batch_tokens == round(1000 / 128) * 128


def test_measured_law_says_when_it_extrapolates(tmp_path: Path) -> None:
    path = tmp_path / "law.json"
    path.write_text(json.dumps(LAW))
    note = at(recipe_from_dict({"name": "measured", "path": str(path)}), 1e6).note
    assert note is not None
    assert "N = 2.28e+05" in note
    assert "D =" not in note
    assert at(Recipe("steplaw"), 1e6).note is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no measured recipe"),
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"peak_lr": {"coefficient": 1}}', "no batch_tokens law"),
        ('{"peak_lr": {"coefficient": -1}, "batch_tokens": {"coefficient": 1}}', "must be positive"),
        ('{"peak_lr": {}, "batch_tokens": {"coefficient": 1}}', "missing coefficient"),
    ],
)
def test_bad_law_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "law.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_law(path)


def test_unknown_recipe_suggests() -> None:
    with pytest.raises(InputError, match="did you mean 'steplaw'"):
        recipe_from_dict({"name": "stepplaw"})
