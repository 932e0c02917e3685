"""The attack, in training and in evaluation. ``eps`` and ``step_size`` are in /255."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distributed_at.config.base import AttackDtype, BnMode, Branch, Pixels, Strict

REFERENCE_LOSSES = ("kl",)  # measured from the clean prediction, not from the label


class AttackConfig(Strict):
    """The training attack, or one evaluation's. eps and step_size are in /255."""

    norm: Literal["linf", "l2"] = "linf"
    eps: Pixels = Field(ge=0, description="radius of the ball, /255")
    num_steps: int = Field(ge=0)
    step_size: Pixels = Field(gt=0, description="step, /255")
    step_rule: Literal["explicit", "at_least_eps_over_steps"] = Field(
        default="explicit",
        description="'at_least_eps_over_steps' = max(step_size, eps / num_steps) (Xie & Yuille's code)",
    )
    start: Literal["uniform", "zero", "gaussian"] = "uniform"
    start_std: float = Field(default=0.001, gt=0, description="of the 'gaussian' start, [0, 1] units (TRADES)")
    clip_start: bool = Field(default=True, description="clip the start to the pixel box; Xie's code and TRADES do not")
    start_clean_probability: float = Field(default=0.0, ge=0, le=1)
    start_clean_scope: Literal["sample", "group"] = Field(
        default="sample", description="one coin per image, or per BN group (Xie & Yuille's code)"
    )
    target: Literal["none", "random_other", "random_any", "most_confusing", "least_likely"] = "none"
    loss: Literal["ce", "kl", "margin", "dlr"] = "ce"
    restarts: int = Field(default=1, ge=1)
    bn_mode: BnMode = Field(
        default="eval",
        description="BN during the attack: running statistics, batch statistics, or batch statistics that also update the running ones",
    )
    branch: Branch = "adv"
    eps_warmup_epochs: float = Field(default=0, ge=0)
    eps_warmup_form: Literal["linear", "overshoot"] = Field(
        default="linear", description="'overshoot' = (t + 1) / n as in the Bag-of-tricks code"
    )
    dtype: AttackDtype = "fp32"
    compile: Literal["auto", "on", "off"] = "auto"
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    precision_certificate: str | None = Field(default=None, description="file of a certificate for a 16-bit attack")

    @model_validator(mode="after")
    def _sense(self) -> AttackConfig:
        if 0 < self.eps < 1:
            raise ValueError(
                f"eps is in /255 units, and {self.eps:g}/255 is below one grey level; "
                f"for {self.eps:g} in [0, 1] units write eps: {self.eps * 255:g}"
            )
        if self.norm == "linf" and self.eps > 255:
            raise ValueError(f"eps is in /255 units, at most 255 for linf, got {self.eps:g}")
        if self.loss == "kl" and self.target != "none":
            raise ValueError(
                "loss 'kl' compares with the clean prediction and has no target; use target: none, or loss: ce"
            )
        if self.norm == "linf" and self.num_steps and 0 < self.eps < self.step_size / 4:
            raise ValueError(
                f"step_size {self.step_size:g}/255 is more than four times eps {self.eps:g}/255; both are in /255"
            )
        if self.start == "gaussian" and self.start_clean_probability > 0:
            raise ValueError(
                "start_clean_probability needs start: uniform or zero; the gaussian start is already near the clean image"
            )
        return self

    @property
    def effective_step_size(self) -> float:
        """Step in /255 after ``step_rule``."""
        if self.step_rule == "at_least_eps_over_steps" and self.num_steps:
            return max(self.step_size, self.eps / self.num_steps)
        return self.step_size
