"""Going on from where no plain resume goes: before the first step, and back past the moment when BN was frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from distributed_at.engine.builder import build_network
from distributed_at.engine.checkpoint.tools import read_checkpoint
from distributed_at.engine.nonfinite import NonfiniteGuard
from distributed_at.errors import EXIT_OK
from distributed_at.models.norm import bn_buffers
from distributed_at.objectives.pgd_at import PgdAt
from distributed_at.recipes import load_recipe
from tests.training_kit import RECIPE, TINY, state_digest, train

ROLLBACK = ["train.on_nonfinite=rollback"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("words", [[], ["optimizer.name=adam", "optimizer.lr=0.01"]], ids=["sgd", "adam"])
def test_a_checkpoint_before_the_first_step_changes_no_number(words: list[str], tmp_path: Path) -> None:
    """It makes the optimiser's state exist earlier than the first step would."""
    assert train(tmp_path / "saved", [*ROLLBACK, *words]) == EXIT_OK
    assert train(tmp_path / "plain", words) == EXIT_OK
    assert state_digest(tmp_path / "saved") == state_digest(tmp_path / "plain")


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("statistics", ["average", "copy_live"])
def test_a_checkpoint_holds_the_whole_state(statistics: str, stage: int, tmp_path: Path) -> None:
    """What no checkpoint holds cannot differ between two of them, so that comparing them would not tell."""
    words = [f"train.ema={{decay: 0.9, buffers: {statistics}}}", f"parallel.zero_stage={stage}", "train.epochs=0.34",
             "schedule.warmup_epochs=0"]  # fmt: skip
    assert train(tmp_path / "run", words) == EXIT_OK
    network = build_network(load_recipe(str(RECIPE), [*TINY, *words]).config, 10)
    kinds = {kind for name, _ in network.named_parameters() for kind in (f"model.{name}", f"ema.{name}")}
    kinds |= {f"optimizer.momentum_buffer.{name}" for name, _ in network.named_parameters()}
    kinds |= {f"buffer.{name}" for name in bn_buffers(network)}
    if statistics == "average":
        kinds |= {f"ema.{name}" for name, b in bn_buffers(network).items() if b.is_floating_point()}
    found, _ = read_checkpoint(tmp_path / "run")
    assert found.keys() == kinds


def knowing(step: int) -> Any:
    """Let every guard know from the beginning that this step is to be passed over."""
    real = NonfiniteGuard.__init__

    def init(self: NonfiniteGuard, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        self.skipped.add(step)

    return mock.patch.object(NonfiniteGuard, "__init__", init)


def test_going_back_before_the_freeze_of_statistics_lets_them_move_again(tmp_path: Path) -> None:
    """Frozen from step 3 on, which is bad; the checkpoint to go back to is of step 2, whose statistics still moved."""
    words = [*ROLLBACK, "train.freeze_bn_from_epoch=1", "checkpoint.every_steps=2"]
    real = PgdAt.loss

    def nan_at_three(self: PgdAt, forward: Any, batch: Any, adv: Any) -> Any:
        terms = real(self, forward, batch, adv)
        if batch.step == 3:
            object.__setattr__(terms, "loss", terms.loss * float("nan"))
        return terms

    with mock.patch.object(PgdAt, "loss", nan_at_three):
        assert train(tmp_path / "back", words) == EXIT_OK
    with knowing(3):
        assert train(tmp_path / "whole", words) == EXIT_OK
    assert state_digest(tmp_path / "back") == state_digest(tmp_path / "whole")
