"""Where attacks begin: points near the clean images, functions of counters alone; they are projected afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from distributed_at import rng
from distributed_at.attacks.balls import Ball


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

    def uniform(self, count: int, *, purpose: rng.Purpose = rng.Purpose.START) -> torch.Tensor:
        """Return (N, count) float32 in [0, 1)."""
        return rng.uniform(self.seed, purpose, self.epoch, self.sample_ids, count, draw=self.draw)

    def normal(self, count: int, *, purpose: rng.Purpose = rng.Purpose.START) -> torch.Tensor:
        """Return (N, count) float32 of the standard normal law."""
        return rng.normal(self.seed, purpose, self.epoch, self.sample_ids, count, draw=self.draw)


# (clean images (N, C, H, W), ball, 0-dim radius, counters, standard deviation) -> points (N, C, H, W).
# The noise of element i of an image is word i of its sample's stream, i counting in (C, H, W) order whatever the layout.
Draw = Callable[[torch.Tensor, Ball, torch.Tensor, Counters, float], torch.Tensor]


def uniform(x: torch.Tensor, ball: Ball, eps: torch.Tensor, counters: Counters, std: float) -> torch.Tensor:
    """Return points of the ball by its own law, which ``Ball.noise`` states."""
    return x + ball.noise(x, eps, counters)


def zero(x: torch.Tensor, ball: Ball, eps: torch.Tensor, counters: Counters, std: float) -> torch.Tensor:
    """Return the clean images (Kurakin et al. 2017, section 2)."""
    return x


def gaussian(x: torch.Tensor, ball: Ball, eps: torch.Tensor, counters: Counters, std: float) -> torch.Tensor:
    """Return x + std * N(0, 1) per element, std in pixel units of [0, 1] (TRADES' code: 0.001)."""
    noise = std * counters.normal(x[0].numel() if len(x) else 0).to(x.dtype)
    return x + noise.reshape(x.shape)
