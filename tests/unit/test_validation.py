"""What selects a checkpoint is measured on training images that are not trained on, never on the test set."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distributed_at.data.sources import open_split
from distributed_at.engine.builder import build_network
from distributed_at.engine.processes.world import World
from distributed_at.engine.validation import Validator
from distributed_at.recipes import load_recipe
from tests.training_kit import RECIPE, TINY

HELD_OUT = ["data.validation_size=30", "evaluation.validation=[{kind: clean}]", "evaluation.every_epochs=1"]


def test_selection_sees_held_out_training_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_recipe(str(RECIPE), [*TINY, *HELD_OUT]).config
    judged = []
    monkeypatch.setattr(
        "distributed_at.engine.validation.measure",
        lambda subject, source, entries, execution: judged.append(source) or [],
    )
    network = build_network(config, 10)
    parts = SimpleNamespace(engine=SimpleNamespace(module=network), average=None)
    Validator(config, World(0, 1, 0, torch.device("cpu"))).run(parts)
    (source,) = judged
    trained = open_split(config.data, "train", seed=config.seed).sample_ids
    everything = open_split(config.data.model_copy(update={"validation_size": 0, "limit_train": None}), "train", seed=0)
    assert source.split == "validation"
    assert len(source.sample_ids) == 30
    assert not np.isin(source.sample_ids, trained).any()
    assert np.isin(source.sample_ids, everything.sample_ids).all()
    ids = source.sample_ids
    same = everything.read(ids, epoch=0, train=False, seed=0)[0]
    assert torch.equal(source.read(ids, epoch=0, train=False, seed=0)[0], same)
