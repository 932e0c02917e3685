"""Adversarial training on adversarial images alone, with the clean BN updates of some published codes as an option."""

from __future__ import annotations

import torch

from distributed_at.attacks.labels import SmoothingForm, smoothed_cross_entropy
from distributed_at.batch import Batch
from distributed_at.config import PgdAtConfig
from distributed_at.objectives.base import BranchName, Forward, Objective, Terms, required_adv


class PgdAt(Objective):
    """Mean cross-entropy of adversarial images (Madry et al. 2018, eq. 2.1; Xie & Yuille, section 3, "100% adv").

    ``bn_clean_updates_per_step`` repeats what two codes do for logging and what enters their BN statistics: 1 = a
    train-mode clean forward after the optimiser's step (Rice et al.'s code); 2 = one before and one after it (Pang et
    al.'s code, "Bag of tricks", table 7 is confounded by it). 0 trains on what the loss sees.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        label_smoothing_form: SmoothingForm = "uniform",
        bn_clean_updates_per_step: int = 0,
        attack_branch: BranchName = "adv",
    ) -> None:
        self.label_smoothing, self.label_smoothing_form = label_smoothing, label_smoothing_form
        self.bn_clean_updates_per_step = bn_clean_updates_per_step
        self.attack_branch = attack_branch

    @classmethod
    def from_config(cls, config: PgdAtConfig, *, attack_branch: BranchName = "adv") -> PgdAt:
        return cls(
            label_smoothing=config.label_smoothing,
            label_smoothing_form=config.label_smoothing_form,
            bn_clean_updates_per_step=config.bn_clean_updates_per_step,
            attack_branch=attack_branch,
        )

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return the mean loss over adversarial images; labels may be smoothed here, never in the attack."""
        adv = required_adv(adv, batch)
        adv_logits = forward(adv, branch=self.attack_branch)
        loss = smoothed_cross_entropy(
            adv_logits, batch.labels, self.label_smoothing, form=self.label_smoothing_form
        ).mean()
        logits = {"adv": adv_logits.detach()}
        if self.bn_clean_updates_per_step == 2:
            # after the adversarial forward and before the optimiser's step, the order of that code
            logits["clean"] = forward(batch.images, branch=self.attack_branch, grad=False).detach()
        return Terms(loss, {"adv_loss": loss.detach()}, logits)

    @property
    def has_after_step(self) -> bool:
        return self.bn_clean_updates_per_step > 0

    def after_step(self, forward: Forward, batch: Batch) -> None:
        """Move BN's running statistics by one clean forward with the new weights, where the recipe asks for it."""
        if self.has_after_step:
            forward(batch.images, branch=self.attack_branch, grad=False)
