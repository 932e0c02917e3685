"""Where attacks begin: points near the clean images, functions of counters alone; they are projected afterwards."""

from __future__ import annotations

from collections.abc import Callable

import torch

from distributed_at.attacks.balls import Ball
from distributed_at.attacks.counters import Counters

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
