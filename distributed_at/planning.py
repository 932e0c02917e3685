"""Says what a recipe is and costs at a world size, before anything runs: arithmetic, rates, FLOPs, memory, hours.

Needs no data, no GPU and no process group; the network is built on the meta device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from distributed_at.accelerators import Gpu, Rate, attack_arithmetic, find_gpu
from distributed_at.config import DataConfig, EvaluationEntry, RunConfig
from distributed_at.cost import config_units
from distributed_at.engine.batching import BatchPlan
from distributed_at.engine.schedules import Schedules
from distributed_at.errors import ConfigError
from distributed_at.evaluation.kinds import KINDS
from distributed_at.objectives import OBJECTIVES
from distributed_at.plan_warnings import PlanWarning, plan_warnings, refuse_lone_image

if TYPE_CHECKING:
    from distributed_at.models.statistics import ModelStatistics

_FLOAT = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class RatePoint:
    """Learning rate and training radius at one step."""

    step: int
    epoch: float
    learning_rate: float
    eps: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Estimated bytes on one GPU, without cuDNN workspaces and allocator slack (allow 10 to 20 % more)."""

    states: int
    activations: int

    @property
    def total(self) -> int:
        """States and activations together."""
        return self.states + self.activations


@dataclass(frozen=True, kw_only=True)
class Hours:
    """Time on one kind of GPU at the rate that its source reports."""

    gpu: str
    precision: str
    rate: Rate
    images_per_second: float
    gpu_hours: float
    wall_hours: float
    memory_gib: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that can be known of a run beforehand; counts are per optimiser step or per run as named."""

    name: str
    world_size: int
    batch: BatchPlan
    num_train: int
    num_test: int
    sizes_assumed: bool
    steps_per_epoch: int
    num_steps: int
    epochs: float
    images: int
    rates: tuple[RatePoint, ...]
    statistics: ModelStatistics
    attack_units: float
    train_units: float
    flops_per_image: float
    flops: float
    evaluation_flops: float | None
    memory: Memory
    checkpoint_bytes: int
    hours: Hours | None
    warnings: tuple[PlanWarning, ...]
    paper: dict[str, Any] | None
    plugins: tuple[tuple[str, str], ...] = ()  # path and SHA-256 of each

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        data = dataclasses.asdict(self)
        data["memory"]["total"] = self.memory.total
        data["batch"]["groups_per_step"] = self.batch.groups_per_step
        data["units_per_image"] = self.attack_units + self.train_units
        return data


def make_plan(
    config: RunConfig, *, world_size: int = 1, gpu: str | None = None, statistics: ModelStatistics | None = None
) -> Plan:
    """Plan ``config`` on ``world_size`` ranks.

    Args:
        config: the resolved recipe.
        world_size: ranks; one GPU each.
        gpu: kind of GPU for memory and hours; null leaves hours out.
        statistics: of the network, where they are already known; otherwise measured on the meta device.

    Raises:
        ConfigError: the world size cannot run the recipe, the GPU is unknown, or the data leave no step.
    """
    kind = find_gpu(gpu) if gpu is not None else None
    _folder.cache_clear()
    _indexed.cache_clear()
    train = config.train
    batch = BatchPlan.resolve(
        batch_size=train.batch_size,
        world_size=world_size,
        micro_batch_size=train.micro_batch_size,
        bn_group_size=train.bn_group_size,
    )
    needs = OBJECTIVES[config.objective.name].needs(config.objective)
    batch.require_whole_groups(needs.whole_groups)
    num_train, num_test = split_sizes(config.data)
    per_epoch = batch.steps_per_epoch(num_train, drop_last=train.drop_last) * needs.repeats
    schedules = Schedules.from_config(config, per_epoch)
    full = train.drop_last or config.data.mixes  # batches that are mixed are all full
    images = _images(schedules.num_steps, per_epoch, num_train * needs.repeats, batch.batch_size, drop_last=full)
    if statistics is None:
        statistics = measure_model(config)
    refuse_lone_image(config, batch, num_train=num_train, num_classes=count_classes(config.data))
    units = config_units(config)
    flops_per_image = units.total * 2.0 * statistics.macs
    memory = estimate_memory(config, batch, statistics)
    warnings = plan_warnings(config, batch, num_train=num_train, has_batch_norm=statistics.buffers > 0)
    hours = None
    if kind is not None:
        hours = _hours(config, kind, flops_per_image=flops_per_image, images=images, world_size=world_size)
        if memory.total > kind.memory_gib * 2**30:
            text = (
                f"about {memory.total / 2**30:.0f} GiB are needed on each {kind.name}, which has {kind.memory_gib:.0f}"
            )
            warnings.append(PlanWarning("out_of_memory", f"{text}; lower train.micro_batch_size, or use more workers"))
    return Plan(
        name=config.name,
        world_size=world_size,
        batch=batch,
        num_train=num_train,
        num_test=num_test,
        sizes_assumed=sizes_are_assumed(config.data),
        steps_per_epoch=per_epoch,
        num_steps=schedules.num_steps,
        epochs=train.epochs,
        images=images,
        rates=tuple(
            RatePoint(step=s, epoch=schedules.epoch(s), learning_rate=schedules.learning_rate(s), eps=schedules.eps(s))
            for s in schedules.key_steps()
        ),
        statistics=statistics,
        attack_units=units.attack,
        train_units=units.train,
        flops_per_image=flops_per_image,
        flops=flops_per_image * images,
        evaluation_flops=_evaluation_flops(config, statistics, num_test),
        memory=memory,
        checkpoint_bytes=checkpoint_bytes(config, statistics),
        hours=hours,
        warnings=tuple(warnings),
        paper=None if config.paper is None else config.paper.model_dump(),
        plugins=tuple((plugin.path, plugin.sha256) for plugin in config.plugins),
    )


def measure_model(config: RunConfig) -> ModelStatistics:
    """Measure the recipe's network on the meta device."""
    from distributed_at.models.statistics import measure

    return measure(config.model, num_classes=count_classes(config.data), image_size=config.data.image_size)


def split_sizes(data: DataConfig) -> tuple[int, int]:
    """Return (training, test) images after validation is held out and limits are applied.

    Of a published data set as published; of a folder what it holds.

    Raises:
        ConfigError: validation takes everything, or a folder is not there to be counted.
    """
    train, test = _published_sizes(data)
    if data.validation_size >= train:
        raise ConfigError(
            f"data.validation_size {data.validation_size} leaves nothing to train on: train has {train} images"
        )
    return min(train - data.validation_size, data.limit_train or train), min(test, data.limit_test or test)


def count_classes(data: DataConfig) -> int:
    """Return the classes: the recipe's, the published data set's, or a folder's.

    Raises:
        ConfigError: none of them says it.
    """
    found = data.num_classes or data.facts.classes
    return found if found is not None else len(_folder(data)[0])


def _published_sizes(data: DataConfig) -> tuple[int, int]:
    if data.facts.train is None or data.facts.test is None:
        _, train, test = _folder(data)
        return train, test
    return _indexed(data) or (data.facts.train, data.facts.test)


def sizes_are_assumed(data: DataConfig) -> bool:
    """Whether the numbers of images are the published ones, of a folder that has not been indexed."""
    return data.facts.folder and data.facts.train is not None and _indexed(data) is None


@lru_cache(maxsize=1)
def _indexed(data: DataConfig) -> tuple[int, int] | None:
    from distributed_at.data.sources import indexed_sizes

    return indexed_sizes(data) if data.facts.folder else None


@lru_cache(maxsize=1)
def _folder(data: DataConfig) -> tuple[tuple[str, ...], int, int]:
    """Return class names and images of a folder's two splits; one plan lists them once."""
    from distributed_at.data.sources import folder_sizes

    return folder_sizes(data)


def estimate_memory(config: RunConfig, batch: BatchPlan, statistics: ModelStatistics) -> Memory:
    """Estimate the bytes on one GPU: weights, gradients, optimiser, then the larger of attack and training pass."""
    weights = statistics.parameters * _FLOAT
    sharded = batch.world_size if config.parallel.zero_stage >= 1 else 1
    optimizer = config.optimizer.facts.states_of(config.optimizer.momentum) * weights // sharded
    if config.parallel.zero_stage >= 1 and batch.world_size > 1:
        optimizer += weights // sharded  # DeepSpeed's own fp32 partition of the weights
    states = 2 * weights + optimizer + statistics.buffers * _FLOAT
    states += weights if config.train.ema else 0
    half_attack = config.attack is not None and config.attack.dtype != "fp32"
    states += weights // 2 if half_attack or config.train.precision == "bf16" else 0
    objective = OBJECTIVES[config.objective.name]
    states += len(objective.needs(config.objective).networks) * (weights + statistics.buffers * _FLOAT)
    passes = objective.passes(config.objective)
    training = passes.activations * statistics.train_bytes * (0.5 if config.train.precision == "bf16" else 1.0)
    attack = 0.0 if config.attack is None else statistics.input_grad_bytes * (0.5 if half_attack else 1.0)
    return Memory(states=states, activations=round(batch.micro_batch * max(training, attack)))


def checkpoint_bytes(config: RunConfig, statistics: ModelStatistics) -> int:
    """Return the bytes of tensors in one checkpoint: weights, optimiser, statistics, averaged weights, other networks."""
    copies = 1 + config.optimizer.facts.states_of(config.optimizer.momentum) + (1 if config.train.ema else 0)
    others = len(OBJECTIVES[config.objective.name].needs(config.objective).networks)
    return (statistics.parameters * (copies + others) + statistics.buffers * (1 + others)) * _FLOAT


def _images(num_steps: int, per_epoch: int, num_train: int, batch_size: int, *, drop_last: bool) -> int:
    """Training images that ``num_steps`` steps see, each use counted; the last batch of an epoch may be incomplete."""
    epochs, rest = divmod(num_steps, per_epoch)
    each = per_epoch * batch_size if drop_last else num_train
    return epochs * each + min(rest * batch_size, each)


def _evaluation_flops(config: RunConfig, statistics: ModelStatistics, num_test: int) -> float | None:
    """FLOPs of ``evaluation.final``; None where the cost of one, such as AutoAttack, depends on who survives."""
    units = [_entry_units(entry, num_test) for entry in config.evaluation.final]
    if any(unit is None for unit in units):
        return None
    branches = 2 if config.model.norm_facts.branches else 1
    return branches * 2.0 * statistics.macs * sum(unit for unit in units if unit is not None)


def _entry_units(entry: EvaluationEntry, num_test: int) -> float | None:
    """Forward-equivalents of one evaluation over the test images; None where they depend on who survives."""
    units = KINDS[entry.kind].forward_units(entry)
    return None if units is None else min(num_test, entry.num_samples or num_test) * units


def _hours(config: RunConfig, gpu: Gpu, *, flops_per_image: float, images: int, world_size: int) -> Hours:
    """Time at a published rate; the attack is nearly all of the work, so its precision chooses the rate."""
    dtype = attack_arithmetic(config.train.precision, config.attack.dtype if config.attack is not None else None)
    rate = gpu.rate(dtype)
    per_gpu = rate.tflops * 1e12 / flops_per_image
    gpu_hours = images / per_gpu / 3600
    return Hours(
        gpu=gpu.name,
        precision=dtype,
        rate=rate,
        images_per_second=per_gpu * world_size,
        gpu_hours=gpu_hours,
        wall_hours=gpu_hours / world_size,
        memory_gib=gpu.memory_gib,
    )
