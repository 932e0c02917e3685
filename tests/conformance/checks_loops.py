"""Checks of the loops around attacks: who reads which image, what resuming needs, what selects, what is evaluated."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import torch

from distributed_at import rng
from distributed_at.objectives.pgd_at import PgdAt
from tests.conformance.networks import images, labels, network
from tests.conformance.product import Product


def ranks_of_all_nodes_share_the_batch(product: Product) -> None:
    order = rng.permutation(0, 0, 64)
    seen: list[int] = []
    for node in range(2):
        for local_rank in range(2):
            rank = node * 2 + local_rank
            rows = product.loops.rows_of_rank(order, 1, 16, rank=rank, local_rank=local_rank, world_size=4)
            seen += rows.tolist()
    assert sorted(seen) == sorted(order[16:32].tolist()), "ranks read the same images or leave some out"


def resumed_training_continues_bitwise(product: Product) -> None:
    x, y = images(24), labels(24)
    whole = product.loops.train(network(), x, y, PgdAt.Config(), steps=5)
    half = product.loops.train(network(), x, y, PgdAt.Config(), steps=3)
    resumed = product.loops.train(network(seed=9), x, y, PgdAt.Config(), steps=5, state=copy.deepcopy(half))
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), f"{name} differs after resuming"


def running_statistics_come_from_the_loss_alone(product: Product) -> None:
    x, y = images(24), labels(24)
    state = product.loops.train(network(), x, y, PgdAt.Config(), steps=3)
    counted = int(state["model"]["1.num_batches_tracked"])
    assert counted == 3, f"{counted} forwards moved BN in 3 steps of adversarial training"


def best_checkpoint_is_chosen_off_the_test_set(product: Product) -> None:
    history = [
        {"step": 10, "validation_robust": 0.40, "test_robust": 0.50},
        {"step": 20, "validation_robust": 0.45, "test_robust": 0.41},
        {"step": 30, "validation_robust": 0.43, "test_robust": 0.60},
    ]
    assert product.loops.best_checkpoint(history) == 20, "the test set chose the checkpoint"


def every_image_is_evaluated_and_kept(product: Product) -> None:
    with tempfile.TemporaryDirectory() as name:
        x, y = images(1203), labels(1203)
        accuracy = product.loops.evaluate(network(), x, y, Path(name))
        ledger = Path(name) / "ledger.jsonl"
        assert ledger.exists(), "results were not kept"
        rows = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(1203)), f"{len(rows)} of 1203 images evaluated"
    assert accuracy == sum(row["correct"] for row in rows) / 1203


def evaluator_is_given_pixels(product: Product) -> None:
    ranges: list[tuple[float, float]] = []

    def evaluator(model, x, y):
        ranges.append((x.min().item(), x.max().item()))
        return x

    product.loops.evaluate_with(network(), images(), labels(), evaluator)
    low, high = ranges[0]
    assert 0 <= low <= high <= 1, f"the evaluator's eps is in [0, 1] units, its images lie in [{low:.2f}, {high:.2f}]"


def logging_the_clean_loss_moves_nothing(product: Product) -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    product.loops.clean_loss(model, images(), labels())
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"a forward for the log changed {name}"


CHECKS = [
    ranks_of_all_nodes_share_the_batch, resumed_training_continues_bitwise,
    running_statistics_come_from_the_loss_alone, best_checkpoint_is_chosen_off_the_test_set,
    every_image_is_evaluated_and_kept, evaluator_is_given_pixels, logging_the_clean_loss_moves_nothing,
]  # fmt: skip
