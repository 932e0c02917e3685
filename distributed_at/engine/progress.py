"""What the loop counts: running means of losses and accuracies between two log rows, and early stopping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from distributed_at.config import EvaluationConfig, TrainConfig
from distributed_at.evaluation import EvaluationResult
from distributed_at.logits import predicted_classes
from distributed_at.objectives import Terms


class Meters:
    """Sums on the device, read only when a row is logged, so that no step waits for the GPU.

    Each number is a mean over the images that it was computed from: those of the micro-batches that have it, and of a
    branch that keeps some images of a batch these alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}  # name -> images that its sum is over
        self._images = 0  # trained on since the last row, or since a resume: those that the clock has seen
        self._last_step = -1

    def add(self, terms: Terms, labels: torch.Tensor, *, unlabelled: int = 0) -> None:
        """Count one micro-batch's loss, its terms and the accuracy of its logits.

        ``unlabelled``: how many of its labels are -1; they are neither right nor wrong.
        """
        n = len(labels)
        for name, value in {**terms.terms, "loss": terms.loss}.items():
            count = terms.counts.get(name, n)
            self._add(name, value.detach().to(torch.float64) * count, count)
        for branch, logits in terms.logits.items():
            hits = predicted_classes(logits.detach()) == terms.labels_of(branch, labels)
            if len(hits) > unlabelled:
                self._add(f"{branch}_accuracy", hits.sum(), len(hits) - unlabelled)
        self._images += n

    def _add(self, name: str, value: torch.Tensor, count: int) -> None:
        value = value.to(torch.float64)
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + count

    def state(self) -> dict[str, Any]:
        """Return this rank's sums since the last row as JSON, exactly (hexadecimal floats; infinities too)."""
        return {"counts": dict(self._counts), "sums": {name: float(v).hex() for name, v in self._sums.items()}}

    def load(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> None:
        """Take back the sums of all ranks; at another world size the first rank takes them all."""
        mine = list(states[rank : rank + 1]) if len(states) == world_size else list(states) if rank == 0 else []
        self._sums, self._counts = {}, {}
        for state in mine:
            for name, value in state["sums"].items():
                exact = torch.tensor(float.fromhex(value), dtype=torch.float64, device=self._device)
                self._add(name, exact, state["counts"][name])

    def steps_since(self, step: int) -> int:
        """Return the steps since the last row, and start counting anew."""
        steps, self._last_step = step - self._last_step, step
        return steps

    def start_at(self, step: int) -> None:
        """Count from here: the run resumes before ``step``."""
        self._last_step, self._images = step - 1, 0

    def collect(
        self,
        reduce: Callable[[torch.Tensor], torch.Tensor],
        gather: Callable[[list[str]], list[list[str]]] = lambda names: [names],
    ) -> tuple[dict[str, float], int]:
        """Return means over all ranks since the last call, and on how many images all ranks have trained since.

        ``reduce`` sums a tensor over ranks. ``gather`` returns every rank's names: a rank that had no images since the
        last call, as in an incomplete last batch, knows none, and must reduce a tensor of the same shape.
        """
        names = sorted({name for own in gather(sorted(self._sums)) for name in own})
        counts = [self._counts.get(name, 0) for name in names]
        total = torch.tensor([*(0.0 for _ in names), *counts, self._images], dtype=torch.float64, device=self._device)
        for place, name in enumerate(names):
            if name in self._sums:
                total[place] = self._sums[name]
        *found, images = reduce(total).tolist()
        means = zip(names, found[: len(names)], found[len(names) :], strict=True)
        self._sums, self._counts, self._images = {}, {}, 0
        return {name: value / count for name, value, count in means if count}, int(images)


class EarlyStopping:
    """Follows held-out robust accuracy: the best so far, and whether patience has run out or accuracy has collapsed."""

    def __init__(self, train: TrainConfig, evaluation: EvaluationConfig) -> None:
        self._patience = train.patience_epochs
        self._largest_drop = train.stop_on_drop
        # the last protocol in the list is the strongest one asked for, and the one that selects
        self._selects = bool(evaluation.validation)
        self.best: dict[str, Any] | None = None
        self.should_stop = False
        self.collapse: tuple[float, float] | None = None  # accuracy before and after a drop that ends the run
        self._before: float | None = None

    def update(self, step: int, results: Sequence[EvaluationResult], steps_per_epoch: int) -> bool:
        """Take a validation round; return whether it is the best so far."""
        if not self._selects or not results:
            return False
        result = results[-1]
        before, self._before = self._before, result.accuracy
        # Wong et al.'s code: after each epoch, PGD-5 on one batch, "drops by more than 0.2"
        if before is not None and self._largest_drop is not None and before - result.accuracy > self._largest_drop:
            self.collapse, self.should_stop = (before, result.accuracy), True
        if self.best is None or result.correct > self.best["correct"]:
            self.best = {
                "step": step,
                "protocol": result.protocol.name,
                "correct": result.correct,
                "total": result.total,
                "accuracy": result.accuracy,
            }
            return True
        if self._patience is not None and step - self.best["step"] >= self._patience * steps_per_epoch:
            self.should_stop = True
        return False

    @property
    def ending(self) -> str:
        """How a run ends that ``should_stop``: 'collapsed', or 'early' where accuracy rose no more."""
        return "early" if self.collapse is None else "collapsed"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "should_stop": self.should_stop, "before": self._before, "collapse": self.collapse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.should_stop = state["best"], state["should_stop"]
        self._before = state.get("before")  # an earlier version kept none
        collapse = state.get("collapse")
        self.collapse = None if collapse is None else (collapse[0], collapse[1])
