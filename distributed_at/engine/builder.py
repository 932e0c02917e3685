"""Builds a run's parts from its recipe: network, engine, twin, attack, objective, order and schedules.

Nothing here trains; ``trainer.py`` runs what is built here.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from distributed_at.attacks import PGD
from distributed_at.attacks.iteration import Iteration
from distributed_at.config import RunConfig
from distributed_at.data.order import Order
from distributed_at.data.source import ImageSource
from distributed_at.data.training import open_training
from distributed_at.engine.averaging import WeightAverage
from distributed_at.engine.batching import BatchPlan, total_steps
from distributed_at.engine.buffers import BufferMerger
from distributed_at.engine.optimizers import build_optimizer
from distributed_at.engine.parallel import TrainingEngine
from distributed_at.engine.processes.world import World
from distributed_at.engine.runs.data import RunData, agree_on_data, require_labels
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.engine.runs.initial_weights import begin_from, read_into
from distributed_at.engine.schedules import Schedules
from distributed_at.engine.twin.check import TwinCheck, wanted
from distributed_at.engine.twin.compiled_attack import IterationWork, build_iteration, convolutions_to_compile
from distributed_at.engine.twin.folding import GroupNormReLU
from distributed_at.engine.twin.regions import count_convolutions
from distributed_at.engine.twin.twin import Twin
from distributed_at.float32 import allow_tf32
from distributed_at.models import build_model, measure
from distributed_at.models.norm import bn_layers, set_group_size, set_process_group
from distributed_at.objectives import ITSELF, OBJECTIVES, Objective, ObjectiveContext, build_objective


@dataclass
class Parts:
    """Everything that one step needs."""

    config: RunConfig
    world: World
    plan: BatchPlan
    source: ImageSource
    order: Order
    engine: TrainingEngine
    twin: Twin | None
    attack: PGD | None
    iteration: Iteration | None
    objective: Objective
    views: dict[str, Twin]  # of the objective's other networks
    buffers: BufferMerger
    average: WeightAverage | None
    schedules: Schedules
    total_steps: int
    data: RunData
    initial_weights: dict[str, Any] | None = None
    twin_check: TwinCheck | None = None
    view_checks: tuple[TwinCheck, ...] = ()

    @property
    def skips_nonfinite(self) -> bool:
        """Whether a non-finite gradient leaves the weights as they were (ZeRO 1 and 2, and one process; not ZeRO 0)."""
        return self.config.parallel.zero_stage > 0

    def refresh_views(self) -> None:
        """Bring what the attack sees up to date: the optimiser, an objective or a resume has changed the weights."""
        for twin in (self.twin, *self.views.values()):
            if twin is not None:
                twin.refresh()

    def start_step(self, step: int) -> None:
        """Set what depends on the step number alone: the learning rate, momentum and the BN stage."""
        self.engine.set_learning_rate(self.schedules.learning_rate(step), self.schedules.momentum(step))
        freeze_from = self.config.train.freeze_bn_from_epoch
        if freeze_from is not None and not self.engine.frozen_bn and self.schedules.epoch(step) >= freeze_from:
            self.engine.freeze_bn()


def seed_everything(config: RunConfig) -> None:
    """Seed the generators that third-party code may use (our own draws come from counters), and set the arithmetic."""
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    allow_tf32(config.train.precision == "tf32")
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        # a debugging aid that costs a seventh of a step
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
    else:
        torch.backends.cudnn.benchmark = True


def num_classes_of(config: RunConfig, source: ImageSource) -> int:
    """Return the width of the classifier: the recipe's, else the data set's."""
    return config.data.num_classes or source.num_classes


def build_network(config: RunConfig, num_classes: int, image_size: int | None = None) -> nn.Module:
    """Return the network of a recipe, initialised from the recipe's seed.

    Weights stay contiguous: DeepSpeed flattens them and cannot broadcast channels-last ones. Images are channels-last,
    and so is every activation; the twin lays its own weights out.
    """
    torch.manual_seed(config.seed)
    return build_model(config.model, num_classes=num_classes, image_size=image_size)


def _another_network(
    config: RunConfig, num_classes: int, image_size: int, weights: str | None, world: World, folder: RunFolder | None
) -> nn.Module:
    """Return a network for an objective beside the one that is trained: frozen, in eval mode (collective)."""
    module = build_network(config, num_classes, image_size)
    if folder is not None:
        if weights is not None:
            read_into(module, weights, world, folder)
        else:
            begin_from(module, config, world, folder)
    return module.to(world.device).requires_grad_(False).eval()


def keep_trainable(module: nn.Module, config: RunConfig) -> None:
    """For BN-only finetuning leave gradients to the batch norms alone (Xie & Yuille, section 4.4).

    Of a mixture, to the branch that the finetuning's images use.
    """
    branch = config.train.bn_only
    if branch is None:
        return
    module.requires_grad_(False)
    for layer in bn_layers(module, branch):
        layer.requires_grad_(True)


def set_groups(module: nn.Module, objective: Objective, plan: BatchPlan) -> None:
    """Tell BN which consecutive samples of a forward form a group, branch by branch (design invariant 2)."""
    if plan.group_free:
        return
    for branch, size in objective.bn_group_sizes(plan.group_size).items():
        for layer in bn_layers(module, branch):  # a plain one serves both branches, whose sizes are then equal
            layer.group_size = size


def synchronise_groups(module: nn.Module, config: RunConfig, plan: BatchPlan, world: World) -> None:
    """Let ranks that share one BN group normalise together (collective: every rank calls it)."""
    if config.model.sync_bn and world.world_size > 1:
        set_process_group(module, cast(dist.ProcessGroup, dist.group.WORLD))
    elif plan.ranks_per_group > 1:
        first = world.rank - world.rank % plan.ranks_per_group
        ranks = list(range(first, first + plan.ranks_per_group))
        # made by its members alone: otherwise every rank would take part in making every group
        group = cast(dist.ProcessGroup, dist.new_group(ranks, use_local_synchronization=True))
        dist.all_reduce(torch.zeros(1, device=world.device), group=group)  # connects them while a lost one is noticed
        set_process_group(module, group)


def _attack_work(
    config: RunConfig, twin: Twin, plan: BatchPlan, source: ImageSource, order: Order, world: World
) -> IterationWork:
    assert config.attack is not None
    statistics = measure(config.model, num_classes=num_classes_of(config, source), image_size=source.image_size)
    return IterationWork(
        macs=statistics.macs,
        convolutions=count_convolutions(twin.module),
        compiled_convolutions=convolutions_to_compile(twin),
        fused_norms=sum(isinstance(layer, GroupNormReLU) for layer in twin.module.modules()),
        batch_size=plan.micro_batch,
        images=total_steps(config.train.epochs, order.steps_per_epoch) * plan.micro_batch * plan.accumulation,
        num_steps=config.attack.num_steps * config.attack.restarts,
        device_type=world.device.type,
    )


def build_parts(
    config: RunConfig,
    world: World,
    folder: RunFolder | None = None,
    warn: Callable[[str, str], None] | None = None,
    *,
    accept_data: bool = False,
) -> Parts:
    """Build all parts of a training run on this rank.

    ``folder``: the run's; a new run takes ``train.init_from`` where it names one. Without a folder none are read.
    ``warn``: called with (code, message) for what the data source meets, such as damaged files.
    ``accept_data``: go on from a checkpoint that was trained on other data.
    """
    seed_everything(config)
    plan = BatchPlan.resolve(
        batch_size=config.train.batch_size,
        world_size=world.world_size,
        micro_batch_size=config.train.micro_batch_size,
        bn_group_size=config.train.bn_group_size,
    )
    needs = OBJECTIVES[config.objective.name].needs(config.objective)
    plan.require_whole_groups(needs.whole_groups)
    source, order = open_training(config, repeats=needs.repeats, warn=warn)
    data = agree_on_data(config, world, source, warn=warn, accept_changed=accept_data)
    require_labels(config, source)
    num_classes = num_classes_of(config, source)
    module = build_network(config, num_classes, source.image_size)
    initial_weights = None
    if folder is not None:
        initial_weights = begin_from(module, config, world, folder, class_names=source.class_names)
    module = module.to(world.device)
    keep_trainable(module, config)
    schedules = Schedules.from_config(config, order.steps_per_epoch)
    context = ObjectiveContext(
        num_classes=num_classes,
        seed=config.seed,
        shared_statistics=config.model.norm_facts.shared_statistics,
        attack_branch=config.attack.branch if config.attack is not None else "adv",
        places=plan.share,
        image_size=source.image_size,
        device=str(world.device),
        attack=config.attack,
        eps=lambda step: schedules.eps(step) / 255.0,
        new_network=lambda weights: _another_network(config, num_classes, source.image_size, weights, world, folder),
    )
    objective = build_objective(config.objective, context)
    if objective.place_tensors():
        plan = replace(plan, keeps_places=True)
        if not config.train.drop_last:
            plan.require_whole_groups(
                f"objective '{config.objective.name}' keeps rows for places of an incomplete batch"
            )
    set_groups(module, objective, plan)
    synchronise_groups(module, config, plan, world)
    optimizer = build_optimizer(config.optimizer, module, lr=schedules.learning_rate(0))
    module.train()
    given = config.attack is not None and needs.attack == "given"
    spare = copy.deepcopy(module) if given and wanted() else None
    engine = TrainingEngine(
        module,
        optimizer,
        plan=plan,
        parallel=config.parallel,
        train=config.train,
        world=world,
        clip_norm=config.optimizer.clip_norm,
    )
    attack = twin = iteration = twin_check = None
    views: dict[str, Twin] = {}
    view_checks: tuple[TwinCheck, ...] = ()
    if config.attack is not None and (given or needs.itself):
        # after the engine exists: DeepSpeed may have moved the parameters' storage
        twin = Twin(
            engine.module, bn_mode=config.attack.bn_mode, branch=config.attack.branch, dtype=config.attack.dtype
        )
        if not plan.group_free:
            set_group_size(twin.module, plan.group_size)  # the attack's forwards hold adversarial images alone
    if config.attack is not None and twin is not None and given:
        attack = PGD.from_config(config.attack, num_classes=num_classes)
        iteration = build_iteration(config.attack, attack, twin, _attack_work(config, twin, plan, source, order, world))
        if spare is not None:
            group_size = None if plan.group_free else plan.group_size
            twin_check = TwinCheck(spare, engine.module, twin, config.attack, group_size)
    if config.attack is not None:
        views = {
            name: Twin(network, bn_mode="eval", branch=config.attack.branch, dtype=config.attack.dtype)
            for name, network in objective.networks().items()
        }
        objective.views = {**views, **({ITSELF: twin} if twin is not None and needs.itself else {})}
        if wanted():
            in_eval = config.attack.model_copy(update={"bn_mode": "eval"})
            view_checks = tuple(
                TwinCheck(copy.deepcopy(network), network, views[name], in_eval, name=f"the {name}")
                for name, network in objective.networks().items()
            )
    return Parts(
        config=config,
        world=world,
        plan=plan,
        source=source,
        order=order,
        engine=engine,
        twin=twin,
        attack=attack,
        iteration=iteration,
        objective=objective,
        views=views,
        buffers=BufferMerger(engine.module, world),
        average=WeightAverage(engine.module, config.train.ema) if config.train.ema is not None else None,
        schedules=schedules,
        total_steps=total_steps(config.train.epochs, order.steps_per_epoch),
        data=data,
        initial_weights=initial_weights,
        twin_check=twin_check,
        view_checks=view_checks,
    )
