"""What follows when a step's loss, gradient or weights are not finite, or its loss jumps: stop, or go back and pass over it.

It only decides and counts; going back is the trainer's work. What it knows is saved with every checkpoint, so that a
resumed run passes over the same steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

import torch

from distributed_at.config import TrainConfig
from distributed_at.errors import DivergedError
from distributed_at.objectives import Terms

LOSSES_KEPT = 32  # a jump is judged against the median of so many steps
LOSSES_NEEDED = 8
FINE, GRADIENT, LOSS, SPIKE = 0, 1, 2, 3  # ranks agree on the largest
WORDS = {GRADIENT: "gradient", LOSS: "loss", SPIKE: "jump of the loss"}


class NonfiniteGuard:
    """Counts bad steps and says what to do about one: ``"skip"`` (weights are intact), ``"rollback"``, or DivergedError.

    Attributes:
        skipped: optimiser steps whose batches a rollback passes over.
        in_row: bad steps in a row that were skipped in place.
    """

    def __init__(self, config: TrainConfig, *, weights_stay: bool) -> None:
        self._config = config
        self._weights_stay = weights_stay  # a non-finite gradient leaves them as they were
        self.skipped: set[int] = set()
        self.in_row = 0
        self._losses: list[float] = []

    @property
    def watches_jumps(self) -> bool:
        """Whether each step's loss is to be agreed on and handed to ``jumps``."""
        return self._config.spike_factor is not None

    def jumps(self, loss: float) -> bool:
        """Whether this step's loss (mean over the global batch) is far above the recent ones; else remember it."""
        factor = self._config.spike_factor
        if factor is None:
            return False
        if len(self._losses) >= LOSSES_NEEDED and loss > factor * statistics.median(self._losses):
            return True
        if math.isfinite(loss):
            self._losses = [*self._losses[1 - LOSSES_KEPT :], loss]
        return False

    def passed(self) -> None:
        """Count a good step."""
        self.in_row = 0

    def failed(self, step: int, what: str, *, weights_stay: bool | None = None) -> Literal["skip", "rollback"]:
        """Decide about bad step ``step`` (from 0), the same on all ranks.

        Raises:
            DivergedError: too many, or the recipe says stop and the weights are gone.
        """
        most = self._config.max_nonfinite_steps
        if self._config.on_nonfinite == "rollback":
            self.skipped.add(step)
            row = 1
            while step - row in self.skipped:
                row += 1
            if row >= most:
                raise DivergedError(_told(step, what, row, "even after going back"))
            return "rollback"
        self.in_row += 1
        stay = self._weights_stay if weights_stay is None else weights_stay
        if self.in_row >= most or not stay:
            raise DivergedError(_told(step, what, self.in_row, ""))
        return "skip"

    def check_progress(self, step: int) -> None:
        """Raise DivergedError where the run has gone back to ``step`` too often."""
        since = sum(s >= step for s in self.skipped)
        if since >= self._config.max_nonfinite_steps:
            raise DivergedError(
                f"{since} steps after step {step} gave numbers that are not finite, although each was passed over "
                "(train.max_nonfinite_steps). The checkpoint of that step stands; a lower optimizer.lr usually cures it."
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"skipped": sorted(self.skipped), "in_row": self.in_row, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave; steps already known to be bad stay known."""
        self.skipped |= set(state["skipped"])
        self.in_row, self._losses = state["in_row"], list(state["losses"])


def _told(step: int, what: str, row: int, extra: str) -> str:
    return (
        f"the {what} is not finite at step {step} ({row} step{'s' if row > 1 else ''} in a row{', ' + extra if extra else ''}). "
        "The last good checkpoint stands; the samples are in events.jsonl under 'nonfinite'. A lower optimizer.lr or a "
        "warm-up usually cures it."
    )


def offending_ids(terms: Sequence[Terms], ids: Sequence[torch.Tensor]) -> list[int]:
    """Return the sample ids whose logits are not finite; where none is, those of the micro-batches whose loss is not."""
    rows: list[int] = []
    suspects: list[int] = []
    for term, own in zip(terms, ids, strict=True):
        for name, logits in term.logits.items():
            bad = ~torch.isfinite(logits.detach()).all(dim=1)
            of = own[term.clean_rows] if name == "clean" and term.clean_rows is not None else own
            if len(of) == len(bad):
                rows += of[bad].tolist()
        if not bool(torch.isfinite(term.loss.detach())):
            suspects += own.tolist()
    return sorted(set(rows or suspects))


def weights_finite(module: torch.nn.Module) -> bool:
    """Whether every parameter and every floating-point buffer of the network is finite."""
    tensors = [t.detach() for t in (*module.parameters(), *module.buffers()) if t.is_floating_point() and t.numel()]
    if not tensors:
        return True
    largest = torch.stack([n.float() for n in torch._foreach_norm(tensors, float("inf"))])
    return bool(torch.isfinite(largest).all())
