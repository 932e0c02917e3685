"""Adversarial training on adversarial images alone, with the clean BN updates of some published codes as an option."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distributed_at.objectives.base import BranchName, Forward, Objective, Passes, Terms, required_adv
from distributed_at.objectives.labels import SmoothedSection, SmoothingForm, mean_cross_entropy, smoothed_cross_entropy

if TYPE_CHECKING:
    import torch

    from distributed_at.batch import Batch


class PgdAt(Objective):
    """Mean cross-entropy of adversarial images (Madry et al. 2018, eq. 2.1; Xie & Yuille, section 3, "100% adv").

    ``bn_clean_updates_per_step`` repeats what two codes do for logging and what enters their BN statistics: 1 = a
    train-mode clean forward after the optimiser's step (Rice et al.'s code); 2 = one before and one after it (Pang et
    al.'s code, "Bag of tricks", table 7 is confounded by it). 0 trains on what the loss sees.
    """

    class Config(SmoothedSection):
        """Madry-style adversarial training: cross-entropy on adversarial images."""

        name: Literal["pgd_at"] = "pgd_at"
        bn_clean_updates_per_step: int = Field(
            default=0,
            ge=0,
            le=2,
            description="extra clean forwards that only move BN statistics, as the Bag-of-tricks code does",
        )

    config: Config
    title = "PGD adversarial training"
    source = "Madry et al., Towards deep learning models resistant to adversarial attacks, ICLR 2018"
    branches = ("adv",)
    attack_losses = ("kl",)  # AT-KL of Gowal et al., table 2: the attack alone looks at the clean prediction

    @classmethod
    def passes(cls, config: Config) -> Passes:
        clean: list[BranchName] = ["clean"] * config.bn_clean_updates_per_step
        return Passes(trained={"adv": 1.0}, moving=("adv", *clean), watched=float(len(clean)))

    @classmethod
    def clean_share(cls, config: Config) -> float | None:
        return 0.0

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return the mean loss over adversarial images; labels may be smoothed here, never in the attack."""
        c, branch = self.config, self.context.attack_branch
        adv = required_adv(adv, batch)
        adv_logits = forward(adv, branch=branch)
        loss = mean_cross_entropy(adv_logits, batch, c)
        logits = {"adv": adv_logits.detach()}
        if c.bn_clean_updates_per_step == 2:
            # after the adversarial forward and before the optimiser's step, the order of that code
            logits["clean"] = forward(batch.images, branch=branch, grad=False).detach()
        return Terms(loss, {"adv_loss": loss.detach()}, logits)

    @property
    def has_after_step(self) -> bool:
        return self.config.bn_clean_updates_per_step > 0

    def after_step(self, forward: Forward, batch: Batch) -> None:
        """Move BN's running statistics by one clean forward with the new weights, where the recipe asks for it."""
        if self.has_after_step:
            forward(batch.images, branch=self.context.attack_branch, grad=False)


def pgd_at_loss(
    adv_logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, *, form: SmoothingForm = "uniform"
) -> torch.Tensor:
    """Return the scalar loss of the adversarial images' logits (N, K) and labels (N,)."""
    return smoothed_cross_entropy(adv_logits, labels, label_smoothing, form=form).mean()
