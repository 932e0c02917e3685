"""Tells whoever watches for hangs that an evaluation gets on, on this rank or on those that it waits for.

A rank may have no samples left while another has an hour of AutoAttack before it. The first then waits, for longer than
any collective may take, and is not hung as long as the other gets on.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from distributed_at.evaluation.sharding import Shard
from distributed_at.groups import shared_group

_TOLD_EVERY = 1.0  # seconds between two signs of life to the other ranks
_LOOKED_EVERY = 0.25  # seconds
_PATIENCE = datetime.timedelta(days=365)  # a rank that is gone is noticed at once, one that hangs by the missing signs
_COUNTER = "distributed_at/evaluation/heartbeat"


class Heartbeat:
    """Signs of life of one evaluation. ``alive`` is called wherever this rank or one that it waits for gets on."""

    def __init__(self, shard: Shard, alive: Callable[[], None]) -> None:
        self._alive = alive
        self._group = shared_group("evaluation/heartbeat", _PATIENCE) if shard.connected else None
        # torch has no public name for the store that every rank met at; its own checkpoints use this one too
        self._store = dist.distributed_c10d._get_default_store() if shard.connected else None
        self._told = 0.0

    def beat(self) -> None:
        """This rank gets on: call it before each forward pass."""
        self._alive()
        now = time.monotonic()
        if self._store is not None and now - self._told >= _TOLD_EVERY:
            self._told = now
            self._store.add(_COUNTER, 1)

    def wait(self) -> None:
        """Wait until every rank has come here. RuntimeError where one is gone."""
        if self._store is None:
            return
        sign = torch.zeros(1)
        meeting = dist.all_reduce(sign, group=self._group, async_op=True)
        heard = self._store.add(_COUNTER, 0)
        pause = 0.001
        while not meeting.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, _LOOKED_EVERY)
            if (count := self._store.add(_COUNTER, 0)) != heard:
                heard = count
                self._alive()
        meeting.wait()
