"""How the ranks of an evaluation share samples and put their rows together; works without torch.distributed too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist

from distributed_at.evaluation.rows import CLEAN, COLUMNS, SURVIVED, Rows, concatenate

_T = TypeVar("_T")


@dataclass(frozen=True)
class Shard:
    """This process among ``world_size``; ``connected`` says whether collectives join them."""

    rank: int
    world_size: int
    connected: bool
    device: torch.device

    @classmethod
    def here(cls, rank: int | None, world_size: int | None, device: torch.device) -> Shard:
        """Return this process's shard: from torch.distributed where it runs, else from the arguments.

        Explicit ``rank`` and ``world_size`` without torch.distributed are for jobs that share nothing but a folder:
        each returns what the folder holds when it ends.

        Raises:
            ValueError: where the arguments contradict torch.distributed or are out of range.
        """
        if dist.is_available() and dist.is_initialized():
            actual = (dist.get_rank(), dist.get_world_size())
            asked = (actual[0] if rank is None else rank, actual[1] if world_size is None else world_size)
            if asked != actual:
                raise ValueError(f"rank, world_size are {asked}, but torch.distributed runs as {actual}")
            on = device if dist.get_backend() == "nccl" else torch.device("cpu")
            return cls(*actual, connected=actual[1] > 1, device=on)
        rank, world_size = rank or 0, 1 if world_size is None else world_size
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        return cls(rank, world_size, connected=False, device=torch.device("cpu"))

    def mine(self, items: Sequence[_T]) -> list[_T]:
        """Return this rank's items, dealt in turn: none is dropped whatever the count."""
        return list(items[self.rank :: self.world_size])

    def reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
        """Reduce a CPU tensor over the ranks; the identity where they are not connected."""
        if not self.connected:
            return tensor
        tensor = tensor.to(self.device)
        dist.all_reduce(tensor, op=operation)
        return tensor.cpu()

    def require_equal(self, name: str, hexadecimal: str) -> None:
        """Raise RuntimeError on every rank where a hash is not the same on all of them."""
        value = int(hexadecimal[:15], 16)  # 60 bits, inside int64
        ends = self.reduce(torch.tensor([value, -value]), dist.ReduceOp.MAX)
        if ends[0].item() != -ends[1].item():
            raise RuntimeError(f"the ranks disagree about {name}; rank {self.rank} has {hexadecimal[:12]}")

    def together(self, work: Callable[[], _T]) -> _T:
        """Run ``work`` on every rank and raise on all of them if it fails on one, so that none waits for ever."""
        error: Exception | None = None
        result: _T | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        failed = self.reduce(torch.tensor([0 if error is None else 1]), dist.ReduceOp.SUM)
        if error is not None:
            raise error
        if failed.item():
            raise RuntimeError(f"the evaluation failed on {failed.item()} other rank(s); see their log")
        return result  # type: ignore[return-value]


_NUMERIC = tuple(name for name in COLUMNS if name not in ("sample_id", "attack"))


def union(shard: Shard, rows: Rows, ids: np.ndarray, attacks: Sequence[str]) -> Rows:
    """Return the union of all ranks' rows over ``ids``, the same on every rank, in the order of sample ids.

    A sample that several ranks hold is taken from the lowest of them. Dense reductions of exact float64 values are
    used, not pickles, so this works alike on gloo and NCCL and moves a few dozen bytes a sample.

    Args:
        ids: sorted sample ids that may occur.
        attacks: names that the ``attack`` column may hold besides ``clean`` and empty.
    """
    if not shard.connected:
        return rows.by_id()
    names = [SURVIVED, CLEAN, *attacks]
    position = np.searchsorted(ids, rows.sample_id)
    owner = torch.full((len(ids),), shard.world_size, dtype=torch.int64)
    owner[torch.from_numpy(position)] = shard.rank
    owner = shard.reduce(owner, dist.ReduceOp.MIN)
    keep = owner[torch.from_numpy(position)].numpy() == shard.rank
    values = torch.zeros((len(ids), len(_NUMERIC) + 1), dtype=torch.float64)
    columns = [getattr(rows, name).astype(np.float64) for name in _NUMERIC]
    columns.append(np.array([names.index(a) for a in rows.attack], dtype=np.float64))
    values[torch.from_numpy(position[keep])] = torch.from_numpy(np.stack(columns, axis=1)[keep])
    values = shard.reduce(values, dist.ReduceOp.SUM)
    present = (owner < shard.world_size).numpy()
    table = values.numpy()[present]
    merged = {name: table[:, i].astype(COLUMNS[name]) for i, name in enumerate(_NUMERIC)}
    return Rows(
        sample_id=ids[present],
        attack=np.array([names[int(i)] for i in table[:, -1]], dtype=np.str_),
        **merged,
    )


def merge(shard: Shard, parts: Sequence[Rows], ids: np.ndarray, attacks: Sequence[str]) -> Rows:
    """Concatenate disjoint rows of this rank and return the union over all ranks."""
    return union(shard, concatenate(parts), ids, attacks)
