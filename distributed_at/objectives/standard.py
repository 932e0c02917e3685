"""Natural training: cross-entropy on clean images, no attack."""

from __future__ import annotations

from typing import ClassVar

import torch

from distributed_at.attacks.labels import SmoothingForm, smoothed_cross_entropy
from distributed_at.batch import Batch
from distributed_at.config import StandardConfig
from distributed_at.objectives.base import BranchName, Forward, Objective, Terms


class Standard(Objective):
    """Mean cross-entropy of clean images, as in the "100% clean" row of Xie & Yuille, "Intriguing properties", section 4."""

    needs_attack: ClassVar[bool] = False
    attack_branch: BranchName = "clean"

    def __init__(self, *, label_smoothing: float = 0.0, label_smoothing_form: SmoothingForm = "uniform") -> None:
        self.label_smoothing, self.label_smoothing_form = label_smoothing, label_smoothing_form

    @classmethod
    def from_config(cls, config: StandardConfig) -> Standard:
        return cls(label_smoothing=config.label_smoothing, label_smoothing_form=config.label_smoothing_form)

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return the mean loss over the batch's clean images; ``adv`` is not used."""
        logits = forward(batch.images, branch="clean")
        loss = smoothed_cross_entropy(logits, batch.labels, self.label_smoothing, form=self.label_smoothing_form).mean()
        return Terms(loss, {"clean_loss": loss.detach()}, {"clean": logits.detach()})
