"""Training may round float32 to TF32 where the recipe says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed_at.engine.builder import seed_everything
from distributed_at.float32 import allow_tf32, tf32
from distributed_at.recipes import load_recipe

SMOKE = Path(__file__).parents[2] / "digits" / "adversarial.yaml"


def allowed() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture(autouse=True)
def as_before():
    with tf32(False):
        yield


@pytest.mark.parametrize(("precision", "expected"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_training_uses_tf32_only_where_the_recipe_says_so(precision: str, expected: bool) -> None:
    allow_tf32(not expected)
    seed_everything(load_recipe(str(SMOKE), [f"train.precision={precision}"]).config)
    assert allowed() == (expected, expected)


def test_a_block_leaves_the_arithmetic_as_it_was() -> None:
    for before in (True, False):
        allow_tf32(before)
        with tf32(not before):
            assert allowed() == (not before, not before)
        assert allowed() == (before, before)
