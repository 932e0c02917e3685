"""What one training step minimises; one class a file in ``objectives/``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distributed_at.config.base import Strict


class StandardConfig(Strict):
    """Natural training: cross-entropy on clean images."""

    name: Literal["standard"] = "standard"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing_form: Literal["uniform", "other_classes"] = "uniform"


class PgdAtConfig(Strict):
    """Madry-style adversarial training: cross-entropy on adversarial images."""

    name: Literal["pgd_at"] = "pgd_at"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing_form: Literal["uniform", "other_classes"] = Field(
        default="uniform",
        description="'uniform' = s/K on every class (TF, torch); 'other_classes' = s/(K-1) on the wrong ones (Pang et al.'s code)",
    )
    bn_clean_updates_per_step: int = Field(
        default=0,
        ge=0,
        le=2,
        description="extra clean forwards that only move BN statistics, as the Bag-of-tricks code does",
    )


class TradesConfig(Strict):
    """TRADES: CE(clean) + beta * KL(p_clean || p_adv), gradient through both (TRADES' code)."""

    name: Literal["trades"] = "trades"
    beta: float = Field(default=6.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing_form: Literal["uniform", "other_classes"] = "uniform"
    clean_forwards: Literal["once", "twice"] = Field(
        default="once",
        description="'twice' = a second train-mode clean forward for the KL target, as the TRADES code",
    )
    clean_bn: Literal["update", "batch"] = Field(
        default="update",
        description="'batch' = the clean forward does not move running statistics (Gowal et al.'s code)",
    )


class MixtureConfig(Strict):
    """Adversarial plus a share of the clean counterparts, one BN, MBN or GN, with optional logit pairing (Xie & Yuille)."""

    name: Literal["mixture"] = "mixture"
    clean_ratio: float = Field(
        default=1.0, ge=0, le=1, description="share of the batch whose clean counterpart is kept, chosen by counters"
    )
    weighting: Literal["alpha", "samples"] = Field(
        default="alpha",
        description="'alpha' = alpha * mean(clean) + (1 - alpha) * mean(adv); 'samples' = mean over all samples",
    )
    alpha: float = Field(default=0.5, ge=0, le=1)
    logit_pairing: float = Field(default=0.0, ge=0, description="weight of adversarial logit pairing")
    logit_pairing_form: Literal["mse_mean", "l2_sum"] = "mse_mean"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing_form: Literal["uniform", "other_classes"] = "uniform"

    @model_validator(mode="after")
    def _pairs(self) -> MixtureConfig:
        if self.logit_pairing > 0 and self.clean_ratio < 1:
            raise ValueError(
                f"logit_pairing pairs every adversarial image with its clean one: clean_ratio must be 1, got {self.clean_ratio:g}"
            )
        return self


ObjectiveConfig = Annotated[StandardConfig | PgdAtConfig | TradesConfig | MixtureConfig, Field(discriminator="name")]
