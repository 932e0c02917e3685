"""What is measured, while training and after it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distributed_at.config.attack import AttackConfig
from distributed_at.config.base import Branch, Strict


class EvalAttackConfig(Strict):
    """One evaluation protocol: clean accuracy, PGD-N, or AutoAttack."""

    kind: Literal["clean", "pgd", "autoattack"]
    name: str | None = Field(default=None, description="name in tables; null = made from the protocol")
    attack: AttackConfig | None = Field(
        default=None, description="null = the training attack's threat with this protocol's own defaults"
    )
    version: Literal["standard", "plus", "rand", "fast"] = Field(
        default="standard", description="AutoAttack's version; 'fast' = APGD-CE and targeted APGD alone"
    )
    branch: Branch | None = Field(default=None, description="null = adv, or both in turn for mbn")
    num_samples: int | None = Field(default=None, gt=0, description="null = the whole split")
    batch_size: int = Field(default=256, gt=0)
    checkpoints: tuple[int, ...] = Field(
        default=(),
        description="fewer numbers of steps, read off the same pass: [20, 100] beside num_steps: 2000 measures PGD-20 and "
        "PGD-100 too; their steps must be of the same size",
    )

    @model_validator(mode="after")
    def _needs_attack(self) -> EvalAttackConfig:
        if self.kind == "pgd" and self.attack is None:
            raise ValueError("kind 'pgd' needs attack: {eps, num_steps, step_size, ...}")
        if self.checkpoints:
            self._one_pass()
        return self

    def _one_pass(self) -> None:
        """Check that PGD at every number of steps is the beginning of one and the same attack."""
        attack = self.attack
        if self.kind != "pgd" or attack is None:
            raise ValueError(f"checkpoints are numbers of PGD steps; kind is '{self.kind}'")
        counts = list(self.checkpoints)
        if counts != sorted(set(counts)) or counts[0] < 1 or counts[-1] >= attack.num_steps:
            raise ValueError(
                f"checkpoints must rise and lie between 1 and num_steps - 1 = {attack.num_steps - 1}, got {counts}"
            )
        if attack.restarts > 1:
            raise ValueError(f"checkpoints are read off one pass: restarts must be 1, got {attack.restarts}")
        for count in counts:
            alone = attack.model_copy(update={"num_steps": count}).effective_step_size
            if alone != attack.effective_step_size:
                raise ValueError(
                    f"checkpoints: PGD-{count} steps by {alone:g}/255 under step_rule '{attack.step_rule}', PGD-"
                    f"{attack.num_steps} by {attack.effective_step_size:g}/255: give PGD-{count} an entry of its own"
                )


class EvaluationConfig(Strict):
    """What is measured while training (on held-out training images) and after it (on the test set)."""

    every_epochs: float | None = Field(default=1.0, gt=0)
    validation: tuple[EvalAttackConfig, ...] = ()
    final: tuple[EvalAttackConfig, ...] = (EvalAttackConfig(kind="clean"),)
