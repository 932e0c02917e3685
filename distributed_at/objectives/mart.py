"""MART: boosted cross-entropy of adversarial images, and a divergence that weighs badly predicted clean images more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distributed_at.lazy import F, torch
from distributed_at.objectives.base import BranchName, Forward, Objective, Passes, Terms, required_adv
from distributed_at.objectives.labels import SmoothedSection, mean_cross_entropy

if TYPE_CHECKING:
    from distributed_at.batch import Batch

# The code's guards against log 0; they stand in the published formula's place and so in the numbers.
_ABOVE_ONE, _TINY = 1.0001, 1e-12
_WEIGHT_ABOVE_ONE = 1.0000001


class Mart(Objective):
    """BCE(adv) + beta * mean of KL(p_clean || p_adv) * (1 - p_clean[y]), the gradient through the clean logits too.

    Wang et al., "Improving adversarial robustness requires revisiting misclassified examples", 2020, eq. 11, with the
    constants of their code: BCE = -log p_adv[y] - log(1.0001 - max over wrong classes of p_adv). Order of the forwards:
    clean, adv. Their attack is on cross-entropy with batch norm in eval mode, from 0.001 * N(0, 1); Gowal et al.
    ("Uncovering the limits", table 2) give MART their own attack and schedule, and no beta.
    ``clean_bn="batch"``: the clean forward moves no running statistics, as everywhere in Gowal et al.'s code. Smoothing,
    which is in none of these, changes the term -log p_adv[y] alone.
    """

    class Config(SmoothedSection):
        """MART: boosted cross-entropy of adversarial images + beta * KL weighted by 1 - p_clean[y]."""

        name: Literal["mart"] = "mart"
        beta: float = Field(default=5.0, ge=0, description="5 for the code's ResNet-18, 6 for its WRN-34-10")
        clean_bn: Literal["update", "batch"] = Field(
            default="update",
            description="'batch' = the clean forward does not move running statistics (Gowal et al.'s code)",
        )

    config: Config
    title = "MART"
    source = "Wang et al., Improving adversarial robustness requires revisiting misclassified examples, ICLR 2020"
    attack_losses = ("kl",)

    @classmethod
    def passes(cls, config: Config) -> Passes:
        moving: tuple[BranchName, ...] = ("clean", "adv") if config.clean_bn == "update" else ("adv",)
        return Passes(trained={"clean": 1.0, "adv": 1.0}, moving=moving)

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return the mean loss over the micro-batch."""
        adv = required_adv(adv, batch)
        bn: Literal["train", "batch"] = "train" if self.config.clean_bn == "update" else "batch"
        clean_logits = forward(batch.images, branch="clean", bn=bn)
        adv_logits = forward(adv, branch="adv")
        cross_entropy = mean_cross_entropy(adv_logits, batch, self.config)
        boosted, weighted = mart_terms(clean_logits, adv_logits, batch.labels, cross_entropy=cross_entropy)
        return Terms(
            boosted + self.config.beta * weighted,
            {"adv_loss": boosted.detach(), "weighted_kl": weighted.detach()},
            {"clean": clean_logits.detach(), "adv": adv_logits.detach()},
        )


def mart_loss(
    clean_logits: torch.Tensor, adv_logits: torch.Tensor, labels: torch.Tensor, beta: float = 5.0
) -> torch.Tensor:
    """Return the scalar loss of logits (N, K), clean and adversarial, and labels (N,)."""
    boosted, weighted = mart_terms(clean_logits, adv_logits, labels)
    return boosted + beta * weighted


def mart_terms(
    clean_logits: torch.Tensor,
    adv_logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    cross_entropy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scalars boosted cross-entropy and weighted KL of logits (N, K) and labels (N,).

    ``cross_entropy``: scalar of the adversarial images where it is not the plain one, e.g. to smoothed labels.
    """
    if cross_entropy is None:
        cross_entropy = F.cross_entropy(adv_logits, labels)
    adv = F.softmax(adv_logits, dim=1)
    wrong = adv.scatter(1, labels[:, None], -1.0).amax(dim=1)
    boosted = cross_entropy - torch.log(_ABOVE_ONE - wrong + _TINY).mean()
    clean_log = F.log_softmax(clean_logits, dim=1)
    clean = clean_log.exp()
    divergence = (clean * (clean_log - torch.log(adv + _TINY))).sum(dim=1)
    weight = _WEIGHT_ABOVE_ONE - clean.gather(1, labels[:, None]).squeeze(1)
    return boosted, (divergence * weight).mean()
