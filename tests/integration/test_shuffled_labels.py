"""The doubter's runs: labels that mean nothing leave accuracy on the true test labels at chance, and a leak shows.

Labels of train and validation are shuffled (``chance.py`` says how and what follows); those of the test images stay true.
Networks of several shuffles are judged together, because one alone scatters widely.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from sklearn.datasets import load_digits

from distributed_at.cli import main
from distributed_at.data import arrays, digits, open_split
from tests.integration.chance import right_answers, tails
from tests.integration.training import tiny, train
from tests.training_kit import one_world

ALARM = 1e-4  # of all judgements of this file that expect chance together
JUDGEMENTS = 8  # two trainings, two checkpoints, two sides
CLASSES = 10
TRUE_LABELS = load_digits().target
OBJECTIVES = ("pgd_at", "standard")
CHECKPOINTS = ("best", "last")

RECIPE = (
    "data={limit_train: 200, limit_test: null, validation_size: 60}",
    "optimizer={lr: 0.1}",
    "schedule={name: cosine}",
    "train={epochs: 24, batch_size: 50, bn_group_size: null, micro_batch_size: null, select: best_validation}",
    "evaluation={every_epochs: 6, validation: [{kind: clean}]}",
    "checkpoint={every_epochs: 6, asynchronous: false}",
    "log.every_steps=50",
)
ATTACK = "{eps: 8, num_steps: 1, step_size: 10}"
FINAL = f"evaluation.final=[{{kind: clean}}, {{kind: pgd, name: pgd, attack: {ATTACK}}}]"


@dataclass(frozen=True)
class Trained:
    """What came of one shuffle: accuracy on the shuffled training labels, and answers to the true test labels."""

    fitted: float
    confusion: dict[str, np.ndarray]  # by checkpoint; (true class, predicted class)
    robust: dict[str, int]  # right answers under attack, by checkpoint


def ids_of_test() -> np.ndarray:
    with open_split(tiny("data.limit_test=null").data, "test", seed=0) as source:
        return source.sample_ids


def shuffled_labels(seed: int) -> np.ndarray:
    """Return labels of all digits: permuted over the images and renamed, but true for the test images."""
    rng = np.random.default_rng([seed, 1])
    rest = np.setdiff1d(np.arange(len(TRUE_LABELS)), ids_of_test())
    labels = TRUE_LABELS.copy()
    labels[rest] = rng.permutation(CLASSES)[rng.permutation(TRUE_LABELS[rest])]
    return labels.astype(np.int64)


def with_leak(count: int, seed: int) -> Callable[..., np.ndarray]:
    """Return a choice of ids that puts ``count`` test images, with their true labels, among those of train."""
    leaked = np.random.default_rng([seed, 2]).choice(ids_of_test(), count, replace=False)
    real = arrays.split_ids

    def ids(published: np.ndarray, config: object, split: str, **options: object) -> np.ndarray:
        found = real(published, config, split, **options)
        return np.union1d(found, leaked) if split == "train" else found

    return ids


def evaluated(folder: Path, checkpoint: str) -> tuple[np.ndarray, int]:
    """Return (confusion, right answers under attack) of what the eval verb measured, held against scikit-learn's labels."""
    printed = io.StringIO()
    worker = mock.patch.dict(os.environ, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # that starts none itself
    with one_world(), worker, contextlib.redirect_stdout(printed):
        assert main(["eval", str(folder), "--checkpoint", checkpoint, "--json"]) == 0
    told = {row["protocol"]: row for row in json.loads(printed.getvalue())["rows"]}
    (written,) = folder.glob(f"evaluations/*{told['pgd']['hash'][:8]}*/rows-*.jsonl")
    rows = [json.loads(line) for line in written.read_text().splitlines()[1:]]
    assert sorted(row["sample_id"] for row in rows) == ids_of_test().tolist()
    assert [row["label"] for row in rows] == [TRUE_LABELS[row["sample_id"]] for row in rows]
    confusion = np.zeros((CLASSES, CLASSES), dtype=int)
    np.add.at(confusion, ([row["label"] for row in rows], [row["clean_prediction"] for row in rows]), 1)
    robust = sum(row["correct_adv"] for row in rows)
    assert (told["clean"]["correct"], told["clean"]["total"]) == (np.trace(confusion), len(rows))
    assert told["pgd"]["correct"] == robust
    return confusion, robust


def trained(folder: Path, objective: str, seed: int, *, leak: int = 0) -> Trained:
    """Train on shuffled labels and evaluate; ``leak`` test images are among the training ones."""
    images, _, names = digits.read_digits()
    labels = shuffled_labels(seed)
    attack = ATTACK if objective == "pgd_at" else "null"
    config = tiny(*RECIPE, FINAL, f"objective={{name: {objective}}}", f"attack={attack}", f"seed={seed}")
    with (
        mock.patch.object(digits, "read_digits", return_value=(images, labels, names)),
        mock.patch.object(arrays, "split_ids", with_leak(leak, seed)),
    ):
        train(config, folder)
        found = {checkpoint: evaluated(folder, checkpoint) for checkpoint in CHECKPOINTS}
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    last = [row for row in events if row["event"] == "train"][-1]
    fitted = last["adv_accuracy"] if objective == "pgd_at" else last["clean_accuracy"]
    return Trained(
        fitted=fitted,
        confusion={checkpoint: confusion for checkpoint, (confusion, _) in found.items()},
        robust={checkpoint: robust for checkpoint, (_, robust) in found.items()},
    )


@pytest.fixture(scope="module")
def shuffles(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Trained]]:
    """Networks of some training, one a shuffle: (objective, seeds, test images that leaked) -> each trained once."""

    @cache
    def networks(objective: str, seeds: range, leak: int = 0) -> list[Trained]:
        return [trained(tmp_path_factory.mktemp("run") / "run", objective, seed, leak=leak) for seed in seeds]

    return networks


def judge_chance(networks: list[Trained], checkpoint: str) -> None:
    low, high = tails([network.confusion[checkpoint] for network in networks])
    right = [int(np.trace(network.confusion[checkpoint])) for network in networks]
    assert min(low, high) > ALARM / JUDGEMENTS, (
        f"{right} of {len(ids_of_test())} are not chance: tails {low:.1g}, {high:.1g}"
    )
    for network, clean in zip(networks, right, strict=True):
        assert network.fitted > 3 / CLASSES, "a network that fits no label shows nothing"
        assert network.robust[checkpoint] <= clean, "an attack that makes answers right has seen the labels"


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_shuffled_labels_end_at_chance_on_the_true_test_labels(shuffles, objective: str, checkpoint: str) -> None:
    judge_chance(shuffles(objective, range(5)), checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_many_shuffles_end_at_chance_on_the_true_test_labels(shuffles, objective: str, checkpoint: str) -> None:
    judge_chance(shuffles(objective, range(100, 130)), checkpoint)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_test_images_that_leaked_into_training_are_seen(shuffles, objective: str, checkpoint: str) -> None:
    networks = shuffles(objective, range(2), leak=60)
    assert tails([network.confusion[checkpoint] for network in networks])[1] < ALARM / JUDGEMENTS


def test_only_labels_of_train_and_validation_are_shuffled() -> None:
    labels, test = shuffled_labels(0), ids_of_test()
    assert (labels[test] == TRUE_LABELS[test]).all()
    rest = np.setdiff1d(np.arange(len(labels)), test)
    assert sorted(np.bincount(labels[rest])) == sorted(np.bincount(TRUE_LABELS[rest]))
    assert (labels[rest] == TRUE_LABELS[rest]).mean() < 0.2


def test_law_of_right_answers_is_that_of_every_order_written_out() -> None:
    confusion = np.random.default_rng(0).poisson(3, (5, 5))
    counts = [sum(confusion[c, k] for c, k in enumerate(order)) for order in itertools.permutations(range(5))]
    law = right_answers(confusion)
    np.testing.assert_allclose(law, np.bincount(counts, minlength=len(law)) / len(counts))
    centred = confusion - confusion.mean(axis=0) - confusion.mean(axis=1, keepdims=True) + confusion.mean()
    places = np.arange(len(law))
    mean = (law * places).sum()
    assert mean == pytest.approx(confusion.sum() / 5)
    assert (law * (places - mean) ** 2).sum() == pytest.approx((centred**2).sum() / 4)
    low, high = tails([confusion, confusion])
    both = [a + b for a, b in itertools.product(counts, counts)]
    assert low == pytest.approx(np.mean([b <= 2 * np.trace(confusion) for b in both]))
    assert high == pytest.approx(np.mean([b >= 2 * np.trace(confusion) for b in both]))
