"""Which epoch is the best, and when there is no use in going on: by the last protocol's count of held-out images."""

from __future__ import annotations

import numpy as np
import pytest

from distributed_at.config import EvaluationConfig, TrainConfig, evaluation_entry
from distributed_at.engine.progress import EarlyStopping
from tests.strangers.test_statistics import made_up

EVALUATION = EvaluationConfig(
    validation=(evaluation_entry(kind="clean"), evaluation_entry(kind="clean", name="robust"))
)
# Held-out images right, of 20, after each epoch of ten steps: clean, and under attack.
CLEAN = [11, 17, 12, 19, 20, 18, 16]
ROBUST = [3, 5, 8, 8, 4, 8, 7]


def followed(patience: float | None = None) -> tuple[EarlyStopping, list[bool], list[bool]]:
    """Go through the epochs; return what follows them, where the best rose, and where it would stop."""
    train = TrainConfig(epochs=7, batch_size=4, select="best_validation", patience_epochs=patience)
    early, rose, stops = EarlyStopping(train, EVALUATION), [], []
    for epoch, (clean, robust) in enumerate(zip(CLEAN, ROBUST, strict=True), start=1):
        results = [made_up(np.arange(20) < clean, title="clean"), made_up(np.arange(20) < robust, title="robust")]
        rose.append(early.update(10 * epoch, results, steps_per_epoch=10))
        stops.append(early.should_stop)
    return early, rose, stops


def test_the_best_is_the_earliest_of_the_most_robust_epochs() -> None:
    early, rose, stops = followed()
    assert rose == [True, True, True, False, False, False, False]
    assert early.best == {"step": 30, "protocol": "robust", "correct": 8, "total": 20, "accuracy": 0.4}
    assert not any(stops)


@pytest.mark.parametrize(("patience", "first"), [(1, 3), (2, 4), (2.5, 5), (4, 6), (5, None)])
def test_patience_is_counted_in_epochs_from_the_best(patience: float, first: int | None) -> None:
    _, _, stops = followed(patience)
    assert stops == [first is not None and epoch >= first for epoch in range(7)]


def test_what_was_the_best_is_remembered_through_a_restart() -> None:
    early, _, _ = followed(patience=4)
    again = EarlyStopping(TrainConfig(epochs=7, batch_size=4, patience_epochs=4), EVALUATION)
    again.load_state_dict(early.state_dict())
    assert again.should_stop
    assert not again.update(80, [made_up(np.arange(20) < 8)], steps_per_epoch=10)
    assert again.update(90, [made_up(np.arange(20) < 9)], steps_per_epoch=10)
    assert again.best is not None
    assert again.best["step"] == 90
