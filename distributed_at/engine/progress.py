"""What the loop counts: running means of losses and accuracies between two log rows, and early stopping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from distributed_at.config import EvaluationConfig, TrainConfig
from distributed_at.evaluation import EvaluationResult
from distributed_at.objectives import Terms


class Meters:
    """Sums on the device, read only when a row is logged, so that no step waits for the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, torch.Tensor] = {}
        self._samples = 0
        self._last_step = -1

    def add(self, terms: Terms, labels: torch.Tensor) -> None:
        """Count one micro-batch's loss, its terms and the accuracy of its logits."""
        n = len(labels)
        values = {"loss": terms.loss.detach() * n}
        values.update({f"{name}": value.detach() * n for name, value in terms.terms.items() if name != "loss"})
        for branch, logits in terms.logits.items():
            if len(logits) == n:  # a mixture keeps some clean images only; their share would not be of this batch
                hits = logits.detach().argmax(1) == terms.labels_of(branch, labels)
                values[f"{branch}_accuracy"] = hits.sum()
        for name, value in values.items():
            value = value.to(torch.float64)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._samples += n

    def state(self) -> dict[str, Any]:
        """Return this rank's sums since the last row as JSON, exactly (hexadecimal floats; infinities too)."""
        return {"samples": self._samples, "sums": {name: float(v).hex() for name, v in self._sums.items()}}

    def load(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> None:
        """Take back the sums of all ranks; at another world size the first rank takes them all."""
        mine = list(states[rank : rank + 1]) if len(states) == world_size else list(states) if rank == 0 else []
        self._sums, self._samples = {}, sum(state["samples"] for state in mine)
        for state in mine:
            for name, value in state["sums"].items():
                self._sums[name] = self._sums.get(name, 0.0) + torch.tensor(
                    float.fromhex(value), dtype=torch.float64, device=self._device
                )

    def steps_since(self, step: int) -> int:
        """Return the steps since the last row, and start counting anew."""
        steps, self._last_step = step - self._last_step, step
        return steps

    def start_at(self, step: int) -> None:
        """Count from here: the run resumes before ``step``."""
        self._last_step = step - 1

    def collect(
        self,
        reduce: Callable[[torch.Tensor], torch.Tensor],
        gather: Callable[[list[str]], list[list[str]]] = lambda names: [names],
    ) -> dict[str, float]:
        """Return sample means over all ranks since the last call.

        ``reduce`` sums a tensor over ranks. ``gather`` returns every rank's names: a rank that had no samples since the
        last call, as in an incomplete last batch, knows none, and must reduce a tensor of the same shape.
        """
        names = sorted({name for own in gather(sorted(self._sums)) for name in own})
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        stacked = torch.stack(
            [self._sums[name].to(self._device) if name in self._sums else zero for name in names]
            + [torch.tensor(float(self._samples), dtype=torch.float64, device=self._device)]
        )
        total = reduce(stacked).tolist()
        self._sums, self._samples = {}, 0
        return {name: value / max(total[-1], 1.0) for name, value in zip(names, total[:-1], strict=True)}


class EarlyStopping:
    """Follows held-out robust accuracy: the best so far, and whether patience has run out."""

    def __init__(self, train: TrainConfig, evaluation: EvaluationConfig) -> None:
        self._patience = train.patience_epochs
        # the last protocol in the list is the strongest one asked for, and the one that selects
        self._selects = bool(evaluation.validation)
        self.best: dict[str, Any] | None = None
        self.should_stop = False

    def update(self, step: int, results: Sequence[EvaluationResult], steps_per_epoch: int) -> bool:
        """Take a validation round; return whether it is the best so far."""
        if not self._selects or not results:
            return False
        result = results[-1]
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

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "should_stop": self.should_stop}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.should_stop = state["best"], state["should_stop"]
