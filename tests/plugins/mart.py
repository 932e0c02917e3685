"""MART: TRADES' idea with the weight on examples that the network gets wrong, as a user would add it: this file alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distributed_at.config.objective import ObjectiveSection
from distributed_at.lazy import F, torch
from distributed_at.objectives.base import Forward, Objective, Passes, Terms, required_adv

if TYPE_CHECKING:
    from distributed_at.batch import Batch


class Mart(Objective):
    """BCE(adv) + beta * mean(KL(p_clean || p_adv) * (1 - p_clean(y))) (Wang et al. 2020, eq. 11 and table 1)."""

    class Config(ObjectiveSection):
        """MART."""

        name: Literal["own_mart"] = "own_mart"
        beta: float = Field(default=5.0, ge=0, description="weight of the KL")

    config: Config
    title = "MART"
    source = "Wang et al., Improving adversarial robustness requires revisiting misclassified examples, ICLR 2020"

    @classmethod
    def passes(cls, config: Config) -> Passes:
        return Passes(trained={"clean": 1.0, "adv": 1.0}, moving=("clean", "adv"))

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        clean_logits = forward(batch.images, branch="clean")
        adv_logits = forward(required_adv(adv, batch), branch="adv")
        loss = mart_loss(clean_logits, adv_logits, batch.labels, beta=self.config.beta)
        return Terms(loss, {}, {"clean": clean_logits.detach(), "adv": adv_logits.detach()})


def mart_loss(
    clean_logits: torch.Tensor, adv_logits: torch.Tensor, labels: torch.Tensor, beta: float = 5.0
) -> torch.Tensor:
    """Return the scalar loss of logits (N, K), clean and adversarial, and labels (N,)."""
    clean, adv = F.log_softmax(clean_logits, dim=1), F.log_softmax(adv_logits, dim=1)
    is_true = F.one_hot(labels, clean.shape[1]).bool()
    wrong = adv.exp().masked_fill(is_true, 0.0).amax(dim=1)  # of the most likely wrong class
    boosted = F.nll_loss(adv, labels, reduction="none") - torch.log(1.0 - wrong + 1e-4)
    divergence = (clean.exp() * (clean - adv)).sum(dim=1)
    return (boosted + beta * divergence * (1.0 - clean.exp()[is_true])).mean()


OBJECTIVES = {"own_mart": Mart}
