"""Optimiser, schedule, batch arithmetic, parallelism and checkpoints."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distributed_at.catalogue.optimizers import OPTIMIZERS, Optimizer
from distributed_at.catalogue.schedules import SCHEDULES, WARMUPS, Schedule
from distributed_at.config.base import Branch, Strict
from distributed_at.config.choice import Choice
from distributed_at.registry import Registry


class OptimizerConfig(Strict):
    """The weights' optimiser."""

    name: Annotated[str, Choice(OPTIMIZERS)] = "sgd"
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of a plug-in's optimiser")
    lr: float = Field(gt=0)
    lr_per: int | None = Field(
        default=None,
        gt=0,
        description="lr holds for a batch of this size and scales linearly (256: Goyal et al.); null = as it stands",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)
    weight_decay_rule: Literal["all", "no_norm_bias", "kernels"] = Field(
        default="all",
        description="'all' parameters; all but norm layers and biases; or convolution and linear kernels alone (Xie & Yuille's code)",
    )
    backend: Literal["torch", "apex"] = "torch"
    rmsprop_decay: float = Field(default=0.9, gt=0, lt=1)
    eps: float = Field(default=1e-8, gt=0, description="of rmsprop (1.0 in the ALP code) and adam")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="of adam and adamw")

    @model_validator(mode="after")
    def _nesterov(self) -> OptimizerConfig:
        if self.nesterov and (not self.facts.nesterov or self.momentum == 0):
            having = ", ".join(name for name in OPTIMIZERS if OPTIMIZERS[name].nesterov)
            raise ValueError(f"nesterov needs optimizer.name: {having} and momentum > 0")
        if self.backend not in self.facts.backends:
            having = ", ".join(name for name in OPTIMIZERS if self.backend in OPTIMIZERS[name].backends)
            raise ValueError(f"backend {self.backend} offers {having}, got {self.name}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas lie in [0, 1), got {list(self.betas)}")
        _no_options(self.name, self.options, OPTIMIZERS)
        return self

    @property
    def facts(self) -> Optimizer:
        """What the optimiser is."""
        return OPTIMIZERS[self.name]


class ScheduleConfig(Strict):
    """Learning rate against epochs, evaluated at every iteration. Times are in epochs and may be fractions."""

    name: Annotated[str, Choice(SCHEDULES)] = "constant"
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of a plug-in's schedule")
    milestones: tuple[float, ...] = Field(
        default=(), description="epochs after which the rate is multiplied by factor (piecewise)"
    )
    factor: float = Field(default=0.1, gt=0, le=1)
    boundary: Literal["after", "last_iteration", "counted_from_one"] = Field(
        default="after",
        description="where a milestone of 100 drops: 'after' = 100 epochs are done; 'last_iteration' = one iteration before "
        "that (Pang et al.'s and Rice et al.'s codes); 'counted_from_one' = the epoch of that number begins, the first being 1, "
        "so after 99 (the codes of TRADES, MART and FAT)",
    )
    final_lr: float = Field(default=0.0, ge=0, description="where cosine and cyclic end")
    peak_epoch: float | None = Field(default=None, gt=0, description="peak of cyclic; null = the middle")
    decay_every: float = Field(default=2.0, gt=0, description="epochs between two factors of exponential (staircase)")
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_start: float | None = Field(default=None, ge=0, description="rate at step 0 of a linear warm-up; null = 0")
    warmup_form: Annotated[str, Choice(WARMUPS)] = Field(
        default="linear", description="'overshoot' = (t + 1) / n as in the Bag-of-tricks code"
    )

    @model_validator(mode="after")
    def _milestones(self) -> ScheduleConfig:
        if self.warmup_start is not None and not WARMUPS[self.warmup_form].from_start:
            having = " or ".join(name for name in WARMUPS if WARMUPS[name].from_start)
            raise ValueError(f"warmup_start belongs to warmup_form {having}; this form is '{self.warmup_form}'")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise, got {list(self.milestones)}")
        if self.facts.milestones and not self.milestones:
            raise ValueError(f"schedule '{self.name}' needs milestones, e.g. milestones: [100, 105]")
        if not self.facts.milestones and self.milestones:
            having = " or ".join(f"'{name}'" for name in SCHEDULES if SCHEDULES[name].milestones)
            raise ValueError(f"milestones belong to schedule {having}; this schedule is '{self.name}'")
        _no_options(self.name, self.options, SCHEDULES)
        return self

    @property
    def drops(self) -> tuple[float, ...]:
        """Epochs that are done when each milestone drops the rate, up to the one iteration of 'last_iteration'."""
        if self.boundary == "counted_from_one":
            return tuple(math.ceil(milestone) - 1.0 for milestone in self.milestones)
        return self.milestones

    @property
    def facts(self) -> Schedule:
        """What the schedule is."""
        return SCHEDULES[self.name]


def _no_options(name: str, options: dict[str, Any], registry: Registry[Any]) -> None:
    if options and registry.origin(name) is None:
        raise ValueError(f"options belong to a plug-in's {registry.kind}; '{name}' has fields of its own")


class EmaConfig(Strict):
    """Exponential moving average of weights (Gowal et al., section 4.3)."""

    decay: float = Field(gt=0, lt=1)
    dynamic: bool = Field(default=False, description="min(decay, (1 + t) / (10 + t)), as in the DeepMind code")
    buffers: Literal["copy_live", "average"] = Field(
        default="copy_live", description="BN statistics used with the averaged weights"
    )


class TrainConfig(Strict):
    """Length, batch arithmetic and precision of training."""

    epochs: float = Field(gt=0, description="passes over the training set; may be a fraction for smoke runs")
    batch_size: int = Field(gt=0, description="global batch: images per optimiser step over all ranks")
    bn_group_size: int | None = Field(
        default=None, gt=0, description="images whose statistics BN sees together; null = what one device holds"
    )
    micro_batch_size: int | None = Field(
        default=None, gt=0, description="images per forward on a device; null = its whole share of the batch"
    )
    drop_last: bool = Field(default=True, description="drop the last incomplete batch of an epoch")
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        default="fp32",
        description="bf16 = autocast of the training pass; tf32 = on GPUs of 2020 and later, float32 convolutions and "
        "products of training and attack keep 11 bits, faster and no longer independent of how a batch is cut; weights "
        "stay fp32, and evaluation is in float32",
    )
    deterministic: bool = True
    freeze_bn_from_epoch: float | None = Field(
        default=None,
        ge=0,
        description="from here BN normalises with frozen running statistics (Xie & Yuille, rows marked '*')",
    )
    bn_only: Branch | None = Field(
        default=None, description="finetune BN alone on clean or adversarial images (Xie & Yuille 4.4)"
    )
    ema: EmaConfig | None = None
    select: Literal["last", "best_validation"] = "last"
    patience_epochs: float | None = Field(
        default=None, gt=0, description="stop when held-out robust accuracy has not risen for this long"
    )
    on_nonfinite: Literal["stop", "rollback"] = Field(
        default="stop",
        description="NaN or infinite loss: stop, or go back to the last good checkpoint and skip the batch",
    )
    max_nonfinite_steps: int = Field(
        default=10, ge=1, description="bad steps in a row, or passed over since one checkpoint, that end the run"
    )
    spike_factor: float | None = Field(
        default=None,
        gt=1,
        description="a loss above so many medians of recent steps counts as not finite; needs on_nonfinite: rollback",
    )
    init_from: str | None = Field(default=None, description="run folder or weights file to start from")

    @model_validator(mode="after")
    def _batch(self) -> TrainConfig:
        if self.bn_group_size is not None and self.batch_size % self.bn_group_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of bn_group_size {self.bn_group_size}")
        if self.spike_factor is not None and self.on_nonfinite != "rollback":
            raise ValueError(
                "spike_factor needs on_nonfinite: rollback, because the step has moved the weights already"
            )
        return self


class ParallelConfig(Strict):
    """How the work is spread; changes speed and memory, never the mathematics."""

    zero_stage: Literal[0, 1, 2] = Field(
        default=1, description="DeepSpeed ZeRO stage; 1 skips a non-finite step everywhere, 0 would apply it"
    )
    overlap_comm: bool = True
    reduce_bucket_size: int = Field(default=50_000_000, gt=0, description="elements per gradient reduction")
    timeout_seconds: float = Field(default=1800.0, gt=0, description="after which a silent rank counts as hung")


class CheckpointConfig(Strict):
    """When checkpoints are written and which stay."""

    every_epochs: float | None = Field(default=1.0, gt=0)
    every_steps: int | None = Field(default=None, gt=0)
    every_minutes: float | None = Field(default=None, gt=0)
    keep: int = Field(
        default=2,
        ge=2,
        description="newest checkpoints kept; the last good one is never removed before the next is good",
    )
    keep_every_epochs: float | None = Field(default=None, gt=0)
    asynchronous: bool = True
