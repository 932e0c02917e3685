"""TRADES: accuracy on clean images plus a penalty on how far the attack moves the prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distributed_at.catalogue.attacks import ATTACK_LOSSES, ATTACK_TARGETS
from distributed_at.lazy import F
from distributed_at.objectives.base import BranchName, Forward, Objective, Passes, Terms, required_adv
from distributed_at.objectives.labels import SmoothedSection, mean_cross_entropy

if TYPE_CHECKING:
    import torch

    from distributed_at.batch import Batch
    from distributed_at.config import RunConfig


class Trades(Objective):
    """CE(clean) + beta * KL(p_clean || p_adv), both means over the batch, gradient through both sides of the KL.

    Zhang et al., "Theoretically principled trade-off", 2019, eq. 5, in the direction of their code; Gowal
    et al., "Uncovering the limits", section 3.1, prints the KL reversed, its code does not. Order of the forwards, which
    BN's running statistics remember: clean, adv ("once", Pang et al.'s ATHE code); clean, adv, clean ("twice", the
    TRADES code, whose KL looks at the second clean forward). ``clean_bn="batch"``: clean forwards use batch statistics
    and move nothing, so running statistics see adversarial images alone (Gowal et al.'s code). Images of ``data.extra``
    without labels count in the KL alone (Carmon et al., "Unlabeled data improves adversarial robustness", 2019).
    """

    class Config(SmoothedSection):
        """TRADES: CE(clean) + beta * KL(p_clean || p_adv), gradient through both (TRADES' code)."""

        name: Literal["trades"] = "trades"
        beta: float = Field(default=6.0, ge=0)
        clean_forwards: Literal["once", "twice"] = Field(
            default="once",
            description="'twice' = a second train-mode clean forward for the KL target, as the TRADES code",
        )
        clean_bn: Literal["update", "batch"] = Field(
            default="update",
            description="'batch' = the clean forward does not move running statistics (Gowal et al.'s code)",
        )

    config: Config
    title = "TRADES"
    source = "Zhang et al., Theoretically principled trade-off between robustness and accuracy, ICML 2019"
    attack_losses = ("kl",)

    @classmethod
    def passes(cls, config: Config) -> Passes:
        order: tuple[BranchName, ...] = (
            ("clean", "adv") if config.clean_forwards == "once" else ("clean", "adv", "clean")
        )
        return Passes(
            trained={"clean": float(order.count("clean")), "adv": 1.0},
            moving=order if config.clean_bn == "update" else ("adv",),
        )

    @classmethod
    def needs_labels(cls, run: RunConfig) -> str | None:
        attack = run.attack
        if attack is None or not ATTACK_LOSSES[attack.loss].from_clean:
            return f"attack.loss '{attack.loss if attack else None}' climbs the loss of the label (use kl)"
        return (
            "early stopping of the attack asks whether an image is misclassified"
            if attack.early_stop is not None
            else None
        )

    @classmethod
    def refuse(cls, run: RunConfig) -> str | None:
        if run.attack is not None and ATTACK_TARGETS[run.attack.target].targeted:
            return (
                "objective 'trades' maximises the divergence from the clean prediction and is untargeted; "
                f"attack.target is '{run.attack.target}'"
            )
        return None

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        """Return CE(clean) + beta * KL over the micro-batch."""
        c = self.config
        adv = required_adv(adv, batch)
        bn: Literal["train", "batch"] = "train" if c.clean_bn == "update" else "batch"
        clean_logits = forward(batch.images, branch="clean", bn=bn)
        adv_logits = forward(adv, branch="adv")
        paired = forward(batch.images, branch="clean", bn=bn) if c.clean_forwards == "twice" else clean_logits
        clean_loss = mean_cross_entropy(clean_logits, batch, c)
        divergence = kl_divergence(paired, adv_logits).mean()
        terms = {"clean_loss": clean_loss.detach(), "kl": divergence.detach()}
        logits = {"clean": clean_logits.detach(), "adv": adv_logits.detach()}
        return Terms(clean_loss + c.beta * divergence, terms, logits)


def trades_loss(
    clean_logits: torch.Tensor, adv_logits: torch.Tensor, labels: torch.Tensor, beta: float = 6.0
) -> torch.Tensor:
    """Return the scalar loss of logits (N, K), clean and adversarial, and labels (N,)."""
    return F.cross_entropy(clean_logits, labels) + beta * kl_divergence(clean_logits, adv_logits).mean()


def kl_divergence(clean_logits: torch.Tensor, adv_logits: torch.Tensor) -> torch.Tensor:
    """Return (N,) KL(p_clean || p_adv) of logits (N, K), differentiable in both."""
    clean, adv = F.log_softmax(clean_logits, dim=1), F.log_softmax(adv_logits, dim=1)
    return (clean.exp() * (clean - adv)).sum(dim=1)
