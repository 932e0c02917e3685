"""When a run's state is saved, what is in it, and how the run goes on from it.

The files themselves are ``checkpoint.py``'s; the tensors of a training state are ``checkpoint_state.py``'s.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from distributed_at.config import CheckpointConfig
from distributed_at.engine.builder import num_classes_of
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.engine.checkpoint.state import after_load, shard_places, training_tensors, whole_networks
from distributed_at.engine.nonfinite import weights_finite
from distributed_at.engine.parallel import gather_all
from distributed_at.engine.processes.preemption import agree_max
from distributed_at.engine.runs.lock import RunLock
from distributed_at.errors import LockedError
from distributed_at.models.norm import bn_buffers

if TYPE_CHECKING:
    from distributed_at.engine.trainer import Trainer

FORMAT = 1
PATIENCE = (10.0, 30.0)  # seconds between the attempts to save a finished run


class Checkpoints:
    """Saves a trainer's whole state when it is due, and puts it back.

    ``lock``: the run's, on rank 0; a run that has lost it to another start saves no more and ends.
    """

    def __init__(self, manager: CheckpointManager, config: CheckpointConfig, lock: RunLock | None = None) -> None:
        self._manager = manager
        self._config = config
        self._lock = lock
        self._last_step = -1
        self.failure: str | None = None  # why the newest save that was waited for did not succeed
        self._last_time = time.monotonic()

    @staticmethod
    def _tensors(trainer: Trainer) -> dict[str, Any]:
        parts = trainer.parts
        ema = parts.average.tensors if parts.average is not None else None
        world = parts.world
        objective = shard_places(parts.objective.place_tensors(), rank=world.rank, world_size=world.world_size)
        objective.update(whole_networks(parts.objective.networks()))
        return training_tensors(
            parts.engine.engine, ema=ema, buffers=bn_buffers(parts.engine.module), objective=objective
        )

    @staticmethod
    def _metadata(trainer: Trainer) -> dict[str, Any]:
        parts, state = trainer.parts, trainer.state
        return {
            "format": FORMAT,
            "step": state.step,
            "epoch": state.step / parts.order.steps_per_epoch,
            "steps_per_epoch": parts.order.steps_per_epoch,
            "world_size": parts.world.world_size,
            "batch_size": parts.plan.batch_size,
            "seed": parts.config.seed,
            "num_classes": num_classes_of(parts.config, parts.source),
            "image_size": parts.source.image_size,
            "class_names": list(parts.source.class_names),
            "frozen_bn": parts.engine.frozen_bn,
            "nonfinite": trainer.guard.state_dict(),
            "meters": gather_all(trainer.meters.state(), trainer.world),
            "early_stopping": trainer.early.state_dict(),
            "objective": parts.objective.state_dict(),
        }

    def resume(self, trainer: Trainer) -> bool:
        """Load the newest good checkpoint into the trainer; return whether there was one."""
        path = self._manager.latest_good()
        if path is None:
            return False
        metadata = self._manager.load(path, self._tensors(trainer))
        parts = trainer.parts
        after_load(parts.engine.engine)
        trainer.state.step = self._last_step = int(metadata["step"])
        trainer.guard.load_state_dict(metadata["nonfinite"])
        trainer.meters.load(metadata["meters"], parts.world.rank, parts.world.world_size)
        trainer.early.load_state_dict(metadata["early_stopping"])
        parts.objective.load_state_dict(metadata["objective"])
        if metadata["frozen_bn"]:
            parts.engine.freeze_bn()
        elif parts.engine.frozen_bn:
            parts.engine.unfreeze_bn()
        return True

    def asks(self) -> bool:
        """Whether this rank's clock asks for a save: the minutes are over, or the wait after a failed save is.

        Ranks must agree on rank 0's answer; it goes with the flags that they exchange in every step.
        """
        minutes = self._config.every_minutes
        if minutes is not None and time.monotonic() - self._last_time >= minutes * 60:
            return True
        return self._manager.retry_is_due

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the step just finished is one to save, by steps or epochs."""
        step, config = trainer.state.step, self._config
        if config.every_steps is not None and step % config.every_steps == 0:
            return True
        if config.every_epochs is not None:
            interval = max(1, round(config.every_epochs * trainer.parts.order.steps_per_epoch))
            return step % interval == 0
        return False

    def save_if_due(self, trainer: Trainer, *, asked: bool = False, force: bool = False, patient: bool = False) -> bool:
        """Save where it is due or ``asked`` for; ``force`` saves at once and waits until the state cannot be lost.

        ``patient``: nothing comes after this save, so try again for a while where the disk refuses. Returns False,
        without saving, where weights or statistics are no longer finite: such a checkpoint is no good one.

        Raises:
            LockedError: on all ranks, where another start holds the run's folder now.
        """
        self._manager.poll()
        if (force or asked or self.is_due(trainer)) and self._last_step != trainer.state.step:
            self._check_lock(trainer)
            bad = not weights_finite(trainer.parts.engine.module)
            if agree_max([int(bad)], group=trainer.world.control)[0]:
                return False
            self._save(trainer, asynchronous=self._config.asynchronous and not force, force=force)
        elif force:
            self._manager.wait()
        for seconds in PATIENCE if patient else ():
            if self.failure is None:
                break
            time.sleep(seconds)
            self._save(trainer, asynchronous=False, force=True)
        return True

    def _check_lock(self, trainer: Trainer) -> None:
        other = self._lock.taken_by() if self._lock is not None else None
        told = gather_all(None if other is None else str(other), trainer.world)[0]
        if told is not None:
            raise LockedError(f"this run's folder was taken over by {told}; this start ends without saving")

    def _save(self, trainer: Trainer, *, asynchronous: bool, force: bool) -> None:
        result = self._manager.save(
            trainer.state.step,
            self._tensors(trainer),
            self._metadata(trainer),
            asynchronous=asynchronous,
            force=force,
        )
        self.failure = "; ".join(result.failures) if result is not None and not result.ok else None
        self._last_step, self._last_time = trainer.state.step, time.monotonic()

    def mark_best(self, trainer: Trainer, best: dict[str, Any] | None) -> None:
        """Save the state that held-out images prefer, and keep it until a better one is there."""
        assert best is not None
        if not weights_finite(trainer.parts.engine.module):  # the same on all ranks
            return
        if self._last_step != trainer.state.step:
            self._save(trainer, asynchronous=False, force=True)
        if self.failure is None:  # else the best one that exists stays marked
            self._manager.mark_best(trainer.state.step, best["accuracy"])

    def wait(self) -> None:
        """Wait for a save in the background; call before leaving."""
        self._manager.wait()
