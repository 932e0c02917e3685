"""Held-out accuracy while training: all ranks evaluate a copy of the network, and all get the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

from torch import nn

from distributed_at.config import RunConfig
from distributed_at.data.source import ImageSource
from distributed_at.data.sources import open_split
from distributed_at.engine.builder import Parts
from distributed_at.engine.processes.world import World
from distributed_at.engine.runs.evaluate_run import looked_at, measure, subject_of
from distributed_at.engine.twin.twin import aliased_copy
from distributed_at.evaluation import EvaluationResult, Execution, Verdict, judge
from distributed_at.float32 import tf32


class Validator:
    """Evaluates ``evaluation.validation`` on images held out of train."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        *,
        warn: Callable[[str, str], None] | None = None,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """``warn``: as in ``open_split``; ``alive``: as in ``evaluate``."""
        self._config = config
        self._world = world
        self._alive = alive
        self._source: ImageSource = open_split(config.data, "validation", seed=config.seed, warn=warn)
        self._network: nn.Module | None = None
        self.verdicts: list[Verdict] = []  # of the newest round, on rank 0
        self._interval = 0

    def is_due(self, step: int, steps_per_epoch: int, total_steps: int) -> bool:
        """Whether ``step`` finished steps are a moment to look, by ``evaluation.every_epochs``."""
        every = self._config.evaluation.every_epochs
        if every is None:
            return step == total_steps
        return step % max(1, round(every * steps_per_epoch)) == 0 or step == total_steps

    def _evaluation_copy(self, parts: Parts) -> nn.Module:
        """Return the network to judge: the live weights seen through an alias, or a copy that holds the average."""
        if self._network is None:
            module = parts.engine.module
            if parts.average is None:
                self._network = aliased_copy(module)
            else:
                # buffers stay aliased unless they are averaged too, so that BN statistics are the live ones
                shared = {id(b): b for n, b in module.named_buffers() if n not in parts.average.tensors}
                self._network = copy.deepcopy(aliased_copy(module), shared)
            self._network.eval()
        if parts.average is not None:
            parts.average.copy_into(self._network)
        return self._network

    def run(self, parts: Parts) -> Sequence[EvaluationResult]:
        """Evaluate every protocol of the recipe now."""
        subject = subject_of(self._evaluation_copy(parts), self._config)
        execution = Execution(device=self._world.device, alive=self._alive)
        with tf32(False):
            results = measure(subject, self._source, self._config.evaluation.validation, execution)
        if self._world.is_main:
            self.verdicts = [*looked_at(subject, self._source, device=self._world.device), *judge(results)]
        return results
