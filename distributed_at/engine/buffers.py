"""BN statistics belong to the step, not to a rank (design invariant 3).

Each group of a step starts from the step's buffers; the buffers after the step are the sample-weighted mean over all
groups of all ranks. The update is linear in the batch statistics, so the result does not depend on the world size.
"""

from __future__ import annotations

import torch
from torch import nn

from distributed_at.engine.processes.world import World, sum_over_ranks
from distributed_at.models.norm import bn_buffers

_Buffers = tuple[torch.Tensor, torch.Tensor]  # running means and variances, flat; counters of batches


class BufferMerger:
    """Keeps one copy of the BN buffers per group of a step and merges them at the step's end."""

    def __init__(self, module: nn.Module, world: World) -> None:
        named = bn_buffers(module)
        self._floating = [b for b in named.values() if b.is_floating_point()]
        self._counters = [b for b in named.values() if not b.is_floating_point()]
        self._world = world
        self._start: _Buffers | None = None
        self._groups: list[tuple[_Buffers, float]] = []

    def _read(self) -> _Buffers:
        return torch.cat([b.detach().reshape(-1) for b in self._floating]), torch.stack(self._counters)

    def _write(self, buffers: _Buffers) -> None:
        flat, counts = buffers
        pieces = flat.split([b.numel() for b in self._floating])
        torch._foreach_copy_(self._floating, [p.view_as(b) for p, b in zip(pieces, self._floating, strict=True)])
        torch._foreach_copy_(self._counters, list(counts.unbind()))

    def begin_step(self) -> None:
        """Remember the buffers that every group of this step starts from."""
        self._groups = []
        if self._floating:
            self._start = self._read()

    def restore(self) -> None:
        """Put back what the step started from: its groups saw numbers that are not finite."""
        if self._start is not None:
            self._write(self._start)
        self._groups = []

    def begin_group(self) -> None:
        """Put the step's buffers back before the next group runs."""
        if self._groups and self._start is not None:
            self._write(self._start)

    def end_group(self, weight: float) -> None:
        """Keep what the group made of the buffers; ``weight`` is its share of the global batch's samples."""
        if self._floating:
            self._groups.append((self._read(), weight))

    def resume_group(self, index: int) -> None:
        """Continue group ``index`` from where it ended, for forwards that come after the optimiser step."""
        if self._floating:
            self._write(self._groups[index][0])

    def update_group(self, index: int) -> None:
        """Keep what a resumed group made of the buffers."""
        if self._floating:
            self._groups[index] = (self._read(), self._groups[index][1])

    def finish_step(self) -> None:
        """Set the buffers to the weighted mean over all groups and ranks, counters of batches to the nearest whole number."""
        if not self._floating or (self._world.world_size == 1 and len(self._groups) == 1):
            return
        # The mean of increments, not of values: a constant buffer stays bitwise what it was.
        assert self._start is not None
        flat, counts = self._start
        start = torch.cat([flat.double(), counts.double()])
        total = torch.zeros_like(start)
        for group, weight in self._groups:
            total += (torch.cat([part.double() for part in group]) - start) * weight
        sum_over_ranks(self._world, total)
        merged, counted = (start + total).split([flat.numel(), counts.numel()])
        self._write((merged.to(flat.dtype), counted.round().to(counts.dtype)))
