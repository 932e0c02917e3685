"""When a run's state is saved, and how the run goes on from it.

What is in it says ``engine/state.py``; the files are ``manager.py``'s.
"""

from __future__ import annotations

import time
from typing import Any

from distributed_at.config import CheckpointConfig
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.engine.processes.preemption import agree_max
from distributed_at.engine.processes.world import from_main
from distributed_at.engine.runs.lock import RunLock
from distributed_at.engine.state import TrainingState
from distributed_at.errors import LockedError

PATIENCE = (10.0, 30.0)  # seconds between the attempts to save a finished run


class Checkpoints:
    """Saves a run's whole state when it is due, and puts it back.

    ``lock``: the run's, on rank 0; a run that has lost it to another start saves no more and ends.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        config: CheckpointConfig,
        state: TrainingState,
        lock: RunLock | None = None,
    ) -> None:
        self._manager = manager
        self._config = config
        self._state = state
        self._lock = lock
        self._last_step = -1
        self.failure: str | None = None  # why the newest save that was waited for did not succeed
        self._last_time = time.monotonic()

    def resume(self) -> bool:
        """Load the newest good checkpoint into the run's state; return whether there was one."""
        found = self._manager.load_latest(self._state.tensors)
        if found is None:
            return False
        self._state.loaded(found[1])
        self._last_step = self._state.step
        return True

    def asks(self) -> bool:
        """Whether this rank's clock asks for a save: the minutes are over, or the wait after a failed save is.

        Ranks must agree on rank 0's answer; it goes with the flags that they exchange in every step.
        """
        minutes = self._config.every_minutes
        if minutes is not None and time.monotonic() - self._last_time >= minutes * 60:
            return True
        return self._manager.retry_is_due

    def is_due(self) -> bool:
        """Whether the step just finished is one to save, by steps or epochs."""
        step, config = self._state.step, self._config
        if config.every_steps is not None and step % config.every_steps == 0:
            return True
        if config.every_epochs is not None:
            interval = max(1, round(config.every_epochs * self._state.steps_per_epoch))
            return step % interval == 0
        return False

    def save_if_due(self, *, asked: bool = False, force: bool = False, patient: bool = False) -> bool:
        """Save where it is due or ``asked`` for; ``force`` saves at once and waits until the state cannot be lost.

        ``patient``: nothing comes after this save, so try again for a while where the disk refuses. Returns False,
        without saving, where weights or statistics are no longer finite: such a checkpoint is no good one.

        Raises:
            LockedError: on all ranks, where another start holds the run's folder now.
        """
        self._manager.poll()
        if (force or asked or self.is_due()) and self._last_step != self._state.step:
            self._check_lock()
            bad = not self._state.is_finite()
            if agree_max([int(bad)], group=self._state.world.control)[0]:
                return False
            self._save(asynchronous=self._config.asynchronous and not force, force=force)
        elif force:
            self._manager.wait()
        for seconds in PATIENCE if patient else ():
            if self.failure is None:
                break
            time.sleep(seconds)
            self._save(asynchronous=False, force=True)
        return True

    def _check_lock(self) -> None:
        other = self._lock.taken_by() if self._lock is not None else None
        told = from_main(None if other is None else str(other), self._state.world)
        if told is not None:
            raise LockedError(f"this run's folder was taken over by {told}; this start ends without saving")

    def _save(self, *, asynchronous: bool, force: bool) -> None:
        result = self._manager.save(
            self._state.step,
            self._state.tensors(),
            self._state.metadata(),
            asynchronous=asynchronous,
            force=force,
        )
        self.failure = "; ".join(result.failures) if result is not None and not result.ok else None
        self._last_step, self._last_time = self._state.step, time.monotonic()

    def mark_best(self, best: dict[str, Any] | None) -> None:
        """Save the state that held-out images prefer, and keep it until a better one is there."""
        assert best is not None
        if not self._state.is_finite():  # the same on all ranks
            return
        if self._last_step != self._state.step:
            self._save(asynchronous=False, force=True)
        if self.failure is None:  # else the best one that exists stays marked
            self._manager.mark_best(self._state.step, best["accuracy"])

    def wait(self) -> None:
        """Wait for a save in the background; call before leaving."""
        self._manager.wait()
