"""Natural training: cross-entropy on clean images, no attack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from distributed_at.objectives.base import Forward, Needs, Objective, Passes, Terms
from distributed_at.objectives.labels import SmoothedSection, SmoothingForm, mean_cross_entropy, smoothed_cross_entropy

if TYPE_CHECKING:
    import torch

    from distributed_at.batch import Batch


class Standard(Objective):
    """Mean cross-entropy of clean images, as in the "100% clean" row of Xie & Yuille, "Intriguing properties", section 4."""

    class Config(SmoothedSection):
        """Natural training: cross-entropy on clean images."""

        name: Literal["standard"] = "standard"

    config: Config
    title = "natural training"
    source = "empirical risk minimisation"
    branches = ("clean",)

    @classmethod
    def needs(cls, config: Config) -> Needs:
        return Needs(attack="none")

    @classmethod
    def passes(cls, config: Config) -> Passes:
        return Passes(trained={"clean": 1.0}, moving=("clean",))

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return the mean loss over the batch's clean images; ``adv`` is not used."""
        logits = forward(batch.images, branch="clean")
        loss = mean_cross_entropy(logits, batch, self.config)
        return Terms(loss, {"clean_loss": loss.detach()}, {"clean": logits.detach()})


def standard_loss(
    clean_logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, *, form: SmoothingForm = "uniform"
) -> torch.Tensor:
    """Return the scalar loss of logits (N, K) and labels (N,)."""
    return smoothed_cross_entropy(clean_logits, labels, label_smoothing, form=form).mean()
