"""Natural training: cross-entropy on clean images, no attack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distributed_at.config.objective import ObjectiveSection
from distributed_at.objectives.base import Forward, Needs, Objective, Passes, Terms
from distributed_at.objectives.labels import SmoothingForm, smoothed_cross_entropy

if TYPE_CHECKING:
    import torch

    from distributed_at.batch import Batch


class Standard(Objective):
    """Mean cross-entropy of clean images, as in the "100% clean" row of Xie & Yuille, "Intriguing properties", section 4."""

    class Config(ObjectiveSection):
        """Natural training: cross-entropy on clean images."""

        name: Literal["standard"] = "standard"
        label_smoothing: float = Field(default=0.0, ge=0, lt=1)
        label_smoothing_form: SmoothingForm = "uniform"

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
        c = self.config
        logits = forward(batch.images, branch="clean")
        loss = standard_loss(logits, batch.labels, c.label_smoothing, form=c.label_smoothing_form)
        return Terms(loss, {"clean_loss": loss.detach()}, {"clean": logits.detach()})


def standard_loss(
    clean_logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, *, form: SmoothingForm = "uniform"
) -> torch.Tensor:
    """Return the scalar loss of logits (N, K) and labels (N,)."""
    return smoothed_cross_entropy(clean_logits, labels, label_smoothing, form=form).mean()
