"""The process groups beside the default one that a whole process shares. They end with the world (``shutdown_world``).

A group that is still alive when the interpreter ends still has its threads. One of them may then let go of a tensor, which
needs the interpreter, and the process aborts although its work is done. So no module keeps such a group to itself.
"""

from __future__ import annotations

import datetime
from typing import cast

import torch.distributed as dist

from distributed_at.exchange import connect

_shared: dict[str, tuple[dist.ProcessGroup | None, dist.ProcessGroup]] = {}  # name -> the world it is of, group


def shared_group(name: str, timeout: datetime.timedelta) -> dist.ProcessGroup:
    """Return the gloo group of all ranks of this name. The first call in a world makes it: all ranks must call."""
    world = dist.group.WORLD
    if name not in _shared or _shared[name][0] is not world:
        _shared[name] = (world, cast("dist.ProcessGroup", dist.new_group(backend="gloo", timeout=timeout)))
        connect(_shared[name][1])
    return _shared[name][1]


def forget_groups() -> None:
    """Let go of all shared groups; their threads end here, where nobody else holds them."""
    _shared.clear()
