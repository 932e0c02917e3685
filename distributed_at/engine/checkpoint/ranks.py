"""Small agreements between the ranks that save or load together, and one-line reasons for what failed on some of them.

They use a gloo group of their own, so that a background save talks to the other ranks while training uses the default
group; one process needs no group.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException  # not an Exception: it derives from BaseException

from distributed_at.errors import first_line
from distributed_at.exchange import connect, first_object, gather_objects

T = TypeVar("T")
SHOWN = 6  # reasons listed in one message


class Ranks:
    """Rank, world size and object exchange; with no initialised process group it is a world of one."""

    def __init__(self, *, timeout_seconds: float = 1800.0) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.group: Any = None  # gloo
        self.rank, self.world_size = 0, 1
        if self.distributed:
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
            timeout = datetime.timedelta(seconds=timeout_seconds)
            self.group = dist.new_group(backend="gloo", timeout=timeout)
            connect(self.group)
            self._connect_to_first()

    def _connect_to_first(self) -> None:
        """Connect every rank to rank 0, where torch's writer collects what each has to write."""
        own = torch.zeros(1)
        everyone = [torch.zeros(1) for _ in range(self.world_size)] if self.is_first else None
        dist.gather(own, everyone, dst=0, group=self.group)
        dist.scatter(own, everyone, src=0, group=self.group)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone creates, names and removes folders."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on all ranks."""
        return gather_objects(value, self.group) if self.distributed else [value]

    def broadcast(self, value: T) -> T:
        """Rank 0's value on all ranks."""
        return first_object(value, self.group) if self.distributed else value

    def failures(self, reason: str | None) -> list[str]:
        """Every rank's reason for failure, the same list on all ranks; empty where all succeeded."""
        return [f"rank {r}: {why}" for r, why in enumerate(self.gather(reason)) if why]


def attempt(action: Callable[[], Any]) -> str | None:
    """Run ``action``; return None, or in one line why it failed."""
    try:
        action()
    except (Exception, CheckpointException) as error:
        return first_line(error)
    return None


def came_from_outside(error: BaseException) -> bool:
    """Whether the disk or the memory refused, which says nothing of what is in a file."""
    nested = error.failures.values() if isinstance(error, CheckpointException) else ()  # (error, its stack) by rank
    return isinstance(error, (OSError, MemoryError)) or any(came_from_outside(why[0]) for why in nested)


def merge(failures: list[str]) -> str:
    """One sentence where all ranks say the same, else the first few."""
    told = {failure.split(": ", 1)[-1] for failure in failures}
    return told.pop() if len(told) == 1 else "; ".join(failures[:SHOWN])
