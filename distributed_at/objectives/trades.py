"""TRADES: accuracy on clean images plus a penalty on how far the attack moves the prediction."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from distributed_at.attacks.labels import SmoothingForm, smoothed_cross_entropy
from distributed_at.batch import Batch
from distributed_at.config import TradesConfig
from distributed_at.objectives.base import BranchName, Forward, Objective, Terms, required_adv


class Trades(Objective):
    """CE(clean) + beta * KL(p_clean || p_adv), both means over the batch, gradient through both sides of the KL.

    Zhang et al., "Theoretically principled trade-off", 2019, eq. 5, in the direction of their code; Gowal
    et al., "Uncovering the limits", section 3.1, prints the KL reversed, its code does not. Order of the forwards, which
    BN's running statistics remember: clean, adv ("once", Pang et al.'s ATHE code); clean, adv, clean ("twice", the
    TRADES code, whose KL looks at the second clean forward). ``clean_bn="batch"``: clean forwards use batch statistics
    and move nothing, so running statistics see adversarial images alone (Gowal et al.'s code).
    """

    def __init__(
        self,
        *,
        beta: float = 6.0,
        label_smoothing: float = 0.0,
        label_smoothing_form: SmoothingForm = "uniform",
        clean_forwards: Literal["once", "twice"] = "once",
        clean_bn: Literal["update", "batch"] = "update",
        attack_branch: BranchName = "adv",
    ) -> None:
        self.beta = beta
        self.label_smoothing, self.label_smoothing_form = label_smoothing, label_smoothing_form
        self.clean_forwards, self.clean_bn = clean_forwards, clean_bn
        self.attack_branch = attack_branch

    @classmethod
    def from_config(cls, config: TradesConfig, *, attack_branch: BranchName = "adv") -> Trades:
        return cls(
            beta=config.beta,
            label_smoothing=config.label_smoothing,
            label_smoothing_form=config.label_smoothing_form,
            clean_forwards=config.clean_forwards,
            clean_bn=config.clean_bn,
            attack_branch=attack_branch,
        )

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return CE(clean) + beta * KL over the micro-batch."""
        adv = required_adv(adv, batch)
        bn: Literal["train", "batch"] = "train" if self.clean_bn == "update" else "batch"
        clean_logits = forward(batch.images, branch="clean", bn=bn)
        adv_logits = forward(adv, branch="adv")
        paired = forward(batch.images, branch="clean", bn=bn) if self.clean_forwards == "twice" else clean_logits
        clean_loss = smoothed_cross_entropy(
            clean_logits, batch.labels, self.label_smoothing, form=self.label_smoothing_form
        ).mean()
        divergence = kl_divergence(paired, adv_logits).mean()
        return Terms(
            clean_loss + self.beta * divergence,
            {"clean_loss": clean_loss.detach(), "kl": divergence.detach()},
            {"clean": clean_logits.detach(), "adv": adv_logits.detach()},
        )


def kl_divergence(clean_logits: torch.Tensor, adv_logits: torch.Tensor) -> torch.Tensor:
    """Return (N,) KL(p_clean || p_adv) of logits (N, K), differentiable in both."""
    clean, adv = F.log_softmax(clean_logits, dim=1), F.log_softmax(adv_logits, dim=1)
    return (clean.exp() * (clean - adv)).sum(dim=1)
