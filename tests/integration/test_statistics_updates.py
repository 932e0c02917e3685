"""How often one step of a paper's row moves the running statistics, counted: the published codes' own numbers of forwards."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed_at.recipes import load_recipe
from tests.integration.training import tensors, train

# One step on digits; what the row says of attack and objective stays.
SMALL = (
    "data={dataset: digits, image_size: 8, path: null, limit_train: 32, limit_test: 16, validation_size: 0, augment: {pad: 1}}",
    "model={arch: preact_resnet, blocks: [1, 1], block: basic, base_width: 4, stem: cifar}",
    "train={epochs: 1, batch_size: 32, bn_group_size: 32, select: last}",
    "schedule={name: piecewise, milestones: [0.5]}",
    "evaluation={every_epochs: null, validation: [], final: [{kind: clean}]}",
    "checkpoint={asynchronous: false}",
)


@pytest.mark.parametrize(
    ("row", "updates"),
    [
        ("baselines.yaml#resnet18-train", 10 + 1 + 1 + 2),  # iterates, the last again, adversarial, clean twice
        ("baselines.yaml#resnet18-eval", 1 + 2),
        (
            "table9.yaml#eps8-wrn34-10-wd2e-4-train",
            10 + 10 + 1 + 1,
        ),  # iterates, clean in every step, clean, adversarial
        ("table9.yaml#eps8-wrn34-10-wd2e-4-eval", 1 + 1),
    ],
)
def test_one_step_moves_the_statistics_as_often_as_the_published_code(row: str, updates: int, tmp_path: Path) -> None:
    config = load_recipe(f"cifar/bag_of_tricks/{row}", list(SMALL)).config
    state = tensors(train(config, tmp_path / "run"), 1)
    counted = {name: int(value) for name, value in state.items() if name.endswith("num_batches_tracked")}
    assert counted
    assert set(counted.values()) == {updates}
