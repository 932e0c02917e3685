"""What ranks tell each other in few messages: each talks with those at distances 1, 2, 4, … and with nobody else.

A ring, as gloo's own all-gather and all-reduce are, makes 2 (W - 1) messages one after the other, and a full mesh of
connections needs W - 1 sockets a rank. Here it is ceil(log2 W) messages, and twice as many sockets (Bruck et al. 1997).
Large tensors are better served by a ring, which moves the fewest bytes.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
_FIRST_BYTES = 2048  # of a message; longer ones are followed by their rest
_HEADER = 8  # bytes that say how long a message is


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return every rank's object, in rank order, on all ranks of a gloo group that spans the world (None: the default)."""
    if not dist.is_initialized():
        return [value]
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    held = [value]  # of this rank, and of those that follow it
    for distance in _distances(world_size):
        count = min(distance, world_size - distance)
        held += _swap_objects(held[:count], (rank - distance) % world_size, (rank + distance) % world_size, group)
    return [held[(r - rank) % world_size] for r in range(world_size)]


def first_object(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Return rank 0's object on all ranks; what the others give is not looked at."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    box: list[Any] = [value if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]


def largest(values: Sequence[int], group: dist.ProcessGroup | None = None) -> list[int]:
    """Return the element-wise maximum of small integers over all ranks."""
    if not dist.is_initialized():
        return list(values)
    world_size, rank = dist.get_world_size(group), dist.get_rank(group)
    own = torch.tensor(list(values), dtype=torch.int64)
    for distance in _distances(world_size):
        others = _swap(
            own, torch.empty_like(own), (rank - distance) % world_size, (rank + distance) % world_size, group
        )
        own = torch.maximum(own, others)  # what is seen twice changes no maximum
    return [int(v) for v in own.tolist()]


def connect(group: dist.ProcessGroup | None = None) -> None:
    """Connect this rank to those that it will talk with, where connections are made when they are first used.

    A connection that exists tells at once that the other side is gone; one that is still to be made waits for it until
    the group's timeout. So connect while a rank that is lost is still noticed otherwise. Collective.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    gather_objects(None, group)
    first_object(None, group)
    dist.all_reduce(torch.zeros(1), group=group)
    dist.barrier(group=group)


def _distances(world_size: int) -> Iterator[int]:
    distance = 1
    while distance < world_size:
        yield distance
        distance *= 2


def _swap(
    own: torch.Tensor, others: torch.Tensor, to: int, source: int, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Send one tensor and fill another; an empty one is not sent, which its receiver knows."""
    sent = dist.isend(own, dst=to, group=group) if own.numel() else None
    received = dist.irecv(others, src=source, group=group) if others.numel() else None
    for work in (sent, received):
        if work is not None:
            work.wait()
    return others


def _swap_objects(values: list[Any], to: int, source: int, group: dist.ProcessGroup | None) -> list[Any]:
    data = pickle.dumps(values)
    message = bytearray(len(data).to_bytes(_HEADER, "little") + data)
    message.extend(bytes(max(0, _FIRST_BYTES - len(message))))
    own = torch.frombuffer(message, dtype=torch.uint8)
    first = _swap(own[:_FIRST_BYTES], torch.empty(_FIRST_BYTES, dtype=torch.uint8), to, source, group)
    length = int.from_bytes(first[:_HEADER].numpy().tobytes(), "little") + _HEADER
    # one direction may need a second message where the other does not
    rest = torch.empty(max(0, length - _FIRST_BYTES), dtype=torch.uint8)
    _swap(own[_FIRST_BYTES:], rest, to, source, group)
    return pickle.loads(torch.cat([first, rest])[_HEADER:length].numpy().tobytes())
