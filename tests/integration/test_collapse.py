"""A run whose held-out robust accuracy collapses: it ends there, keeps the best weights before, and says so everywhere."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from distributed_at.engine.checkpoint.retention import read_best
from distributed_at.engine.checkpoint.tools import read_checkpoint
from distributed_at.engine.runs.status import run_status
from distributed_at.observe.events import read_events
from distributed_at.observe.report import build_report
from tests.training_kit import train

# Three epochs of six steps at a rate that learns, then one that undoes it.
WORDS = (
    "data.limit_train=288",
    "data.validation_size=60",
    "model.base_width=8",
    "attack={eps: 8, step_size: 4}",
    "train={batch_size: 48, bn_group_size: 48, epochs: 8, select: best_validation, stop_on_drop: 0.15}",
    "optimizer={lr: 0.1, weight_decay: 0}",
    "schedule={name: points, warmup_epochs: 0, points: [[0, 1], [3, 1], [3, 60], [8, 60]]}",
    "evaluation={every_epochs: 1, validation: [{kind: pgd, attack: {eps: 8, num_steps: 2, step_size: 4}}]}",
)


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collapse") / "run"
    assert train(folder, WORDS) == 0
    return folder


def accuracies(folder: Path) -> list[float]:
    return [row["correct"] / row["total"] for row in read_events(folder) if row["event"] == "evaluation"]


def test_the_run_ends_at_the_fall(collapsed: Path) -> None:
    seen = accuracies(collapsed)
    falls = [before - after for before, after in pairwise(seen)]
    assert [fall > 0.15 for fall in falls] == [False] * (len(falls) - 1) + [True]
    assert len(seen) < 8, "it trained to its end"
    (warning,) = [row for row in read_events(collapsed) if row.get("code") == "collapse"]
    assert f"from {seen[-2]:.1%} to {seen[-1]:.1%}" in warning["message"]


def test_the_best_weights_before_it_stand(collapsed: Path) -> None:
    seen, batches = accuracies(collapsed), 288 // 48
    best = read_best(collapsed / "checkpoints")
    assert best is not None
    _, manifest = read_checkpoint(best)
    assert manifest.step == batches * (1 + seen.index(max(seen)))


def test_everything_says_that_it_collapsed_and_the_same_command_does_nothing(collapsed: Path) -> None:
    before = len([row for row in read_events(collapsed) if row["event"] == "train"])
    assert train(collapsed, WORDS) == 0
    rows = read_events(collapsed)
    assert len([row for row in rows if row["event"] == "train"]) == before
    assert [row["reason"] for row in rows if row["event"] == "run_end"][-1] == "collapsed"
    status = run_status(collapsed)
    assert (status.finished, status.reason) == (True, "collapsed")
    assert "robust accuracy collapsed; the best weights before that stand" in build_report(collapsed).read_text()
