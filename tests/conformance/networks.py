"""Small networks and images for the checks; building them leaves the global generators alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

SHAPE = (3, 6, 6)
CLASSES = 5


def images(n: int = 12, *, low: float = 0.0, high: float = 1.0, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    """Return (n, 3, 6, 6) uniform in [low, high]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((n, *SHAPE), generator=generator, dtype=dtype) * (high - low) + low


def labels(n: int = 12, *, classes: int = CLASSES, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))


def ids(n: int = 12, *, first: int = 1000) -> torch.Tensor:
    return torch.arange(first, first + n)


def network(*, dtype=torch.float32, classes: int = CLASSES, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    """Return convolution - BN - tanh - linear in eval mode: smooth, so finite differences apply."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(4 * SHAPE[1] * SHAPE[2], classes),
        ).to(dtype)
        model[1].running_mean.uniform_(-0.5, 0.5)
        model[1].running_var.uniform_(0.5, 1.5)
    return model.eval()


def rising(x: torch.Tensor) -> torch.Tensor:
    """Two logits whose cross-entropy to class 0 rises with every pixel, so the attack's direction is +1 everywhere."""
    total = x.flatten(1).mean(dim=1)
    return torch.stack([-total, total], dim=1)


def regions(x: torch.Tensor) -> torch.Tensor:
    """Logit k is the mean of image row k: a targeted attack brightens its target's row and no other."""
    return 4.0 * x.mean(dim=(1, 3))  # (N, 6)


class Spy:
    """Wraps a model and keeps the images that it was shown."""

    def __init__(self, model: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.model = model
        self.seen: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach().clone())
        return self.model(x)


def distance(adv: torch.Tensor, x: torch.Tensor, norm: str) -> torch.Tensor:
    """Return (N,) float64 distances, computed without the attack's own code."""
    delta = (adv.double() - x.double()).flatten(1)
    return delta.abs().amax(dim=1) if norm == "linf" else delta.square().sum(dim=1).sqrt()
