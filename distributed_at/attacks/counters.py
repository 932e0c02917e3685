"""What the random numbers of an attack are computed from: no generator is involved."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from distributed_at import rng


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What every random number of a start is computed from.

    Attributes:
        seed, epoch: as everywhere.
        sample_ids: (N,) int64.
        draw: number of the restart.
    """

    seed: int
    epoch: int
    sample_ids: torch.Tensor
    draw: int = 0

    def of_step(self, step: int, num_steps: int) -> Counters:
        """Return those of one step of a restart of so many, which no other step shares."""
        return replace(self, draw=self.draw * num_steps + step)

    def uniform(self, count: int, *, purpose: rng.Purpose = rng.Purpose.START) -> torch.Tensor:
        """Return (N, count) float32 in [0, 1)."""
        return rng.uniform(self.seed, purpose, self.epoch, self.sample_ids, count, draw=self.draw)

    def normal(self, count: int, *, purpose: rng.Purpose = rng.Purpose.START) -> torch.Tensor:
        """Return (N, count) float32 of the standard normal law."""
        return rng.normal(self.seed, purpose, self.epoch, self.sample_ids, count, draw=self.draw)
