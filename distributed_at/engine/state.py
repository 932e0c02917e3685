"""The state of a run: all that a checkpoint must hold so that a run goes on as if it had never stopped, and who owns it.

Every owner says its own part (``state_dict``, ``load_state_dict``, or tensors); here is the list of owners. Saving and
loading (``checkpoint/``) know this file's names alone, and nothing of the training loop.
"""

from __future__ import annotations

from typing import Any, Protocol

from distributed_at.engine.builder import Parts, num_classes_of
from distributed_at.engine.checkpoint.state import after_load, shard_places, training_tensors, whole_networks
from distributed_at.engine.nonfinite import NonfiniteGuard, weights_finite
from distributed_at.engine.processes.world import World, gather_all
from distributed_at.engine.progress import EarlyStopping, Meters
from distributed_at.models.norm import bn_buffers

FORMAT = 1


class Resumable(Protocol):
    """Something that is kept between steps, as JSON: equal on all ranks, or gathered from them."""

    def state_dict(self) -> Any:
        """Return what to save."""

    def load_state_dict(self, state: Any) -> None:
        """Take back what ``state_dict`` gave, on any number of ranks."""


class _OfAllRanks:
    """The sums of all ranks' meters as one thing: each rank has its own, and a checkpoint all of them."""

    def __init__(self, meters: Meters, world: World) -> None:
        self._meters, self._world = meters, world

    def state_dict(self) -> list[dict[str, Any]]:
        return gather_all(self._meters.state(), self._world)

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        self._meters.load(state, self._world.rank, self._world.world_size)


class TrainingState:
    """A run's parts, how far it is, and what it keeps between steps.

    Attributes:
        step: optimiser steps taken, those passed over included.
        guard, early, meters: what the loop remembers of bad steps, of held-out accuracy, and since the last log row.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.step = 0
        self.guard = NonfiniteGuard(parts.config.train, weights_stay=parts.skips_nonfinite)
        self.early = EarlyStopping(parts.config.train, parts.config.evaluation)
        self.meters = Meters(parts.world.device)
        self._owners: dict[str, Resumable] = {
            "nonfinite": self.guard,
            "meters": _OfAllRanks(self.meters, parts.world),
            "early_stopping": self.early,
            "objective": parts.objective,
            "frozen_bn": parts.engine,
            "data": parts.data,
        }

    @property
    def world(self) -> World:
        """The ranks that train this run together."""
        return self.parts.world

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return self.parts.order.steps_per_epoch

    @property
    def epoch(self) -> float:
        """Epochs trained, with their fraction."""
        return self.step / self.steps_per_epoch

    def tensors(self) -> dict[str, Any]:
        """Return the tensors to save, or to load into, by name: weights, optimiser, statistics, averages, objective's."""
        parts, world = self.parts, self.world
        objective = shard_places(parts.objective.place_tensors(), rank=world.rank, world_size=world.world_size)
        objective.update(whole_networks(parts.objective.networks()))
        return training_tensors(
            parts.engine.engine,
            ema=parts.average.tensors if parts.average is not None else None,
            buffers=bn_buffers(parts.engine.module),
            objective=objective,
        )

    def metadata(self) -> dict[str, Any]:
        """Return the rest of the state, as JSON, with what describes a checkpoint to its readers; all ranks call it."""
        parts = self.parts
        return {
            "format": FORMAT,
            "step": self.step,
            "epoch": self.epoch,
            "steps_per_epoch": self.steps_per_epoch,
            "world_size": self.world.world_size,
            "batch_size": parts.plan.batch_size,
            "seed": parts.config.seed,
            "num_classes": num_classes_of(parts.config, parts.source),
            "image_size": parts.source.image_size,
            "class_names": list(parts.source.class_names),
            "model": parts.config.model.model_dump(mode="json"),
            "plugins": [plugin.model_dump(mode="json") for plugin in parts.config.plugins],
            **{name: owner.state_dict() for name, owner in self._owners.items()},
        }

    def loaded(self, metadata: dict[str, Any]) -> None:
        """Take back what is not a tensor, once ``tensors()`` hold what was saved."""
        after_load(self.parts.engine.engine)
        self.step = int(metadata["step"])
        for name, owner in self._owners.items():
            if (
                name in metadata or owner is not self.parts.data
            ):  # checkpoints of an earlier version do not say their data
                owner.load_state_dict(metadata[name])

    def is_finite(self) -> bool:
        """Whether this rank's weights and statistics are finite."""
        return weights_finite(self.parts.engine.module)
