"""The attack, in training and in evaluation. ``eps`` and ``step_size`` are in /255."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distributed_at.catalogue.attacks import (
    ATTACK_LOSSES,
    ATTACK_STARTS,
    ATTACK_TARGETS,
    ATTACK_UPDATES,
    BALLS,
    STEP_RULES,
)
from distributed_at.catalogue.schedules import WARMUPS
from distributed_at.config.base import AttackDtype, BnMode, Branch, Pixels, Strict
from distributed_at.config.choice import Choice

CleanStartScope = Literal["sample", "group"]
ReferenceForward = Literal["once", "each_step"]


class AttackConfig(Strict):
    """The training attack, or one evaluation's. eps and step_size are in /255."""

    norm: Annotated[str, Choice(BALLS)] = "linf"
    eps: Pixels = Field(ge=0, description="radius of the ball, /255")
    num_steps: int = Field(ge=0)
    step_size: Pixels = Field(gt=0, description="step, /255")
    step_rule: Annotated[str, Choice(STEP_RULES)] = Field(
        default="explicit",
        description="'at_least_eps_over_steps' = max(step_size, eps / num_steps) (Xie & Yuille's code)",
    )
    step_schedule: tuple[tuple[int, float], ...] = Field(
        default=(),
        description="[[step, factor], ...]: from that step on, steps are so many times as long (Gowal et al.'s code: "
        "[[5, 0.1]])",
    )
    update: Annotated[str, Choice(ATTACK_UPDATES)] = "steepest"
    step_noise: float = Field(
        default=0.0,
        ge=0,
        description="standard deviation, [0, 1] units, of Gaussian noise that every step adds before it is projected (FAT's "
        "code: omega, 0.001); for norm linf and update steepest",
    )
    start: Annotated[str, Choice(ATTACK_STARTS)] = "uniform"
    start_std: float = Field(default=0.001, gt=0, description="of the 'gaussian' start, [0, 1] units (TRADES)")
    clip_start: bool = Field(default=True, description="clip the start to the pixel box; Xie's code and TRADES do not")
    start_clean_probability: float = Field(default=0.0, ge=0, le=1)
    start_clean_scope: CleanStartScope = Field(
        default="sample", description="one coin per image, or per BN group (Xie & Yuille's code)"
    )
    target: Annotated[str, Choice(ATTACK_TARGETS)] = "none"
    loss: Annotated[str, Choice(ATTACK_LOSSES)] = "ce"
    reference_forward: ReferenceForward = Field(
        default="once",
        description="of losses measured from the clean prediction; 'each_step' looks at the clean images in every step, "
        "as TRADES' code, which moves statistics where bn_mode is train",
    )
    restarts: int = Field(default=1, ge=1)
    final_forward: bool = Field(
        default=False,
        description="one more forward after the steps, as Pang et al.'s and Rice et al.'s codes, which moves statistics "
        "where bn_mode is train",
    )
    early_stop: int | None = Field(
        default=None,
        ge=1,
        description="an image is moved no more once so many of the attack's forwards misclassified it (Friendly AT: tau + 1)",
    )
    early_stop_epochs: tuple[float, ...] = Field(
        default=(), description="training epochs at which early_stop rises by one (40 / 70 in Pang et al., table 2)"
    )
    early_stop_boundary: Literal["last_iteration", "after"] = Field(
        default="last_iteration",
        description="when it rises: one iteration before so many epochs are done (Pang et al.'s code), or once they are (FAT's)",
    )
    bn_mode: BnMode = Field(
        default="eval",
        description="BN during the attack: running statistics, batch statistics, or batch statistics that also update the running ones",
    )
    branch: Branch = "adv"
    eps_warmup_epochs: float = Field(default=0, ge=0)
    eps_warmup_form: Annotated[str, Choice(WARMUPS)] = Field(
        default="linear", description="'overshoot' = (t + 1) / n as in the Bag-of-tricks code"
    )
    dtype: AttackDtype = "fp32"
    compile: Literal["auto", "on", "off"] = "auto"
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    precision_certificate: str | None = Field(default=None, description="file of a certificate for a 16-bit attack")

    @model_validator(mode="after")
    def _sense(self) -> AttackConfig:
        ball, loss, start = BALLS[self.norm], ATTACK_LOSSES[self.loss], ATTACK_STARTS[self.start]
        if 0 < self.eps < 1:
            raise ValueError(
                f"eps is in /255 units, and {self.eps:g}/255 is below one grey level; "
                f"for {self.eps:g} in [0, 1] units write eps: {self.eps * 255:g}"
            )
        if self.early_stop_epochs and self.early_stop is None:
            raise ValueError("early_stop_epochs raise early_stop, which is null: write early_stop: 1")
        if list(self.early_stop_epochs) != sorted(set(self.early_stop_epochs)):
            raise ValueError(f"early_stop_epochs must rise, got {list(self.early_stop_epochs)}")
        if self.early_stop_boundary != "last_iteration" and not self.early_stop_epochs:
            raise ValueError("early_stop_boundary says when early_stop_epochs raise early_stop, and there are none")
        if self.step_noise and (not ball.per_pixel or ATTACK_UPDATES[self.update].rule is not None):
            raise ValueError(
                f"step_noise belongs to steps of the sign: norm linf and update steepest, got {self.norm} and {self.update}"
            )
        if ball.per_pixel and self.eps > 255:
            raise ValueError(f"eps is in /255 units, at most 255 for {self.norm}, got {self.eps:g}")
        refusal = loss.refuse(self.loss, targeted=ATTACK_TARGETS[self.target].targeted)
        if refusal is not None:
            raise ValueError(refusal)
        if self.reference_forward != "once" and not loss.from_clean:
            measured = [name for name in ATTACK_LOSSES if ATTACK_LOSSES[name].from_clean]
            raise ValueError(
                f"reference_forward '{self.reference_forward}' is of losses measured from the clean prediction "
                f"({', '.join(measured)}); loss is '{self.loss}'"
            )
        if ball.per_pixel and self.num_steps and 0 < self.eps < self.step_size / 4:
            raise ValueError(
                f"step_size {self.step_size:g}/255 is more than four times eps {self.eps:g}/255; both are in /255"
            )
        if not start.mixes and self.start_clean_probability > 0:
            mixing = [name for name in ATTACK_STARTS if ATTACK_STARTS[name].mixes]
            raise ValueError(
                f"start_clean_probability needs start: {' or '.join(mixing)}; the {self.start} start is already near the "
                "clean image"
            )
        problem = schedule_problem(self.step_schedule)
        if problem is not None:
            raise ValueError(problem)
        return self

    def step_sizes(self) -> list[float]:
        """Return every step in /255, after ``step_rule`` and ``step_schedule``."""
        size, factors, found = self.effective_step_size, dict(self.step_schedule), []
        for step in range(self.num_steps):
            size *= factors.get(step, 1.0)
            found.append(size)
        return found

    @property
    def looks_again(self) -> bool:
        """Whether each step looks at the clean images anew: only where that moves statistics, as nothing else would change."""
        return self.reference_forward == "each_step" and self.bn_mode == "train"

    @property
    def looks_last(self) -> bool:
        """Whether the attack ends with one more forward: only where that moves statistics, as nothing else would change."""
        return self.final_forward and self.bn_mode == "train"

    @property
    def effective_step_size(self) -> float:
        """First step in /255 after ``step_rule``."""
        return STEP_RULES[self.step_rule].size(self.step_size, self.eps, self.num_steps)


def schedule_problem(schedule: tuple[tuple[int, float], ...]) -> str | None:
    """Return what is wrong with a ``step_schedule``, as a sentence."""
    steps = [step for step, _ in schedule]
    if steps != sorted(set(steps)) or any(step < 1 for step in steps):
        return f"step_schedule: its steps must rise from 1 on, got {steps}"
    if any(not 0 < factor < float("inf") for _, factor in schedule):
        return f"step_schedule: its factors must be above 0, got {[factor for _, factor in schedule]}"
    return None
