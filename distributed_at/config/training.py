"""Optimiser, schedule, batch arithmetic, parallelism and checkpoints."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distributed_at.catalogue.optimizers import OPTIMIZERS, Optimizer
from distributed_at.catalogue.schedules import SCHEDULES, WARMUPS, Schedule
from distributed_at.config.base import Branch, Strict
from distributed_at.config.choice import Choice, refuse_unread, unread
from distributed_at.registry import Registry

_EXAMPLES = {"milestones": "[100, 105]", "points": "[[0, 1], [100, 1], [110, 0]]"}


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
    momentum: float = Field(
        default=0.9, ge=0, lt=1, description="of sgd and rmsprop; schedule.momentum_at_peak lets it move"
    )
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
    clip_norm: float | None = Field(
        default=None,
        gt=0,
        description="largest norm of the gradient of the whole batch over all weights together, before weight decay; a "
        "longer one is scaled down to it; null = gradients are not clipped",
    )

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
        refuse_unread(self, self.name, OPTIMIZERS)
        _no_options(self.name, self.options, OPTIMIZERS)
        return self

    def reads(self, field: str) -> bool:
        """Whether the optimiser reads a field that not every one does."""
        return field not in unread(OPTIMIZERS, self.name)

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
    factor: float = Field(default=0.1, gt=0, le=1, description="of piecewise and exponential")
    factors: tuple[float, ...] = Field(
        default=(),
        description="a factor for each milestone, on the rate before it, in place of factor (FAT's code: [0.1, 0.1, 0.5])",
    )
    boundary: Literal["after", "last_iteration", "counted_from_one", "after_warmup"] = Field(
        default="after",
        description="where a milestone of 100 drops: 'after' = 100 epochs are done; 'last_iteration' = one iteration before "
        "that (Pang et al.'s and Rice et al.'s codes); 'counted_from_one' = the epoch of that number begins, the first being 1, "
        "so after 99 (the codes of TRADES, MART and FAT); 'after_warmup' = 100 epochs after the end of warm-up (Gowal et al.'s "
        "code). Points know the first two",
    )
    points: tuple[tuple[float, float], ...] = Field(
        default=(),
        description="[[epoch, share of the rate], ...] with straight lines between; the same epoch twice is a jump to the later",
    )
    final_lr: float = Field(
        default=0.0, ge=0, description="where cosine, cyclic and onecycle end; cyclic begins there too"
    )
    peak_epoch: float | None = Field(
        default=None,
        gt=0,
        description="peak of cyclic, null = the middle; onecycle peaks in the last step (or epoch) of so many epochs, null = 30 % "
        "of the run",
    )
    start_divisor: float = Field(default=25.0, ge=1, description="onecycle begins at so small a part of the rate")
    momentum_at_peak: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="momentum at the peak of cyclic or onecycle, which it falls to from optimizer.momentum as the rate rises "
        "(0.8 in Wong et al.'s code, from 0.9); null = momentum does not move",
    )
    decay_every: float = Field(default=2.0, gt=0, description="epochs between two factors of exponential")
    staircase: bool = Field(default=True, description="exponential drops at once; false = smoothly, step by step")
    changes: Literal["step", "epoch"] = Field(
        default="step",
        description="'epoch' = the formula is of whole epochs and its value stays for one; warm-up goes by steps in any case",
    )
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
        refuse_unread(self, self.name, SCHEDULES)
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must rise, got {list(self.milestones)}")
        for needed in self.facts.needs:
            if not getattr(self, needed):
                raise ValueError(f"schedule '{self.name}' needs {needed}, e.g. {needed}: {_EXAMPLES[needed]}")
        if self.factors:
            self._check_factors()
        if self.points:
            self._check_points()
        if self.momentum_at_peak is not None and self.warmup_epochs:
            raise ValueError(
                "momentum_at_peak follows the rise of the cycle, in whose place warmup_epochs puts another"
            )
        _no_options(self.name, self.options, SCHEDULES)
        return self

    def _check_factors(self) -> None:
        if len(self.factors) != len(self.milestones):
            raise ValueError(f"factors are one for each of {len(self.milestones)} milestones, got {len(self.factors)}")
        if self.factor != type(self).model_fields["factor"].default:
            raise ValueError("factor and factors say the same twice: give one of them")
        if any(not 0 < factor <= 1 for factor in self.factors):
            raise ValueError(f"factors lie in (0, 1], got {list(self.factors)}")

    def _check_points(self) -> None:
        times = [epoch for epoch, _ in self.points]
        if times[0] != 0 or times != sorted(times):
            raise ValueError(f"points begin at epoch 0 and go on from there, got epochs {times}")
        if any(share < 0 for _, share in self.points):
            raise ValueError(f"points: shares of the rate are at least 0, got {[share for _, share in self.points]}")
        if self.boundary not in ("after", "last_iteration"):
            raise ValueError(f"points know boundary 'after' or 'last_iteration', got '{self.boundary}'")

    @property
    def drops(self) -> tuple[float, ...]:
        """Epochs that are done when each milestone drops the rate, up to the one iteration of 'last_iteration'."""
        if self.boundary == "counted_from_one":
            return tuple(math.ceil(milestone) - 1.0 for milestone in self.milestones)
        if self.boundary == "after_warmup":
            return tuple(milestone + self.warmup_epochs for milestone in self.milestones)
        return self.milestones

    @property
    def drop_factors(self) -> tuple[float, ...]:
        """What each milestone multiplies the rate by."""
        return self.factors or (self.factor,) * len(self.milestones)

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
    stop_on_drop: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="stop where held-out robust accuracy falls by more than this share of all images between two looks, which is "
        "how one-step training collapses (0.2 in Wong et al.'s code); the best weights before it are kept",
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
