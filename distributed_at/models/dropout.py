"""Dropout and stochastic depth whose masks come from counters: the same after a resume and on any number of ranks.

A mask is a function of (seed, epoch, sample id, layer, forward of the step); no generator is involved.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from distributed_at import rng
from distributed_at.errors import ConfigError

_FORWARDS = 4096  # of one sample in one step that draw masks of their own


@dataclass(frozen=True)
class Draw:
    """What the masks of one forward are drawn from.

    Attributes:
        ids: (N,) int64 sample ids of the images, in their order.
        epoch, seed: the other keys.
        forward: number of the forward among those of the step.
    """

    ids: torch.Tensor
    epoch: int
    seed: int
    forward: int = 0


class CounterDropout(nn.Module):
    """Drops with probability ``p`` in training and scales the rest by 1 / (1 - p) (Srivastava et al. 2014).

    Args:
        p: probability of a drop.
        kept: leading dimensions that a mask is drawn over: None = every element (dropout), 2 = whole channels, 1 = whole
            images (stochastic depth, Huang et al. 2016).
        number: of this layer in its network.
    """

    def __init__(self, p: float, *, kept: int | None = None, number: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError(f"the probability of a drop must be in [0, 1), got {p:g}")
        self.p, self.kept, self.number = p, kept, number
        self.draw: Draw | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (N, ...) with its mask on, or x itself in eval mode."""
        if not self.training or self.p == 0:
            return x
        if self.draw is None:
            raise ConfigError(
                "a network with dropout in training mode needs to know its images: run it within "
                "models.dropout.drawing(network, Draw(ids, epoch, seed)), or call network.eval()"
            )
        images = len(self.draw.ids)
        if x.shape[0] % max(images, 1):
            raise ConfigError(f"dropout of {tuple(x.shape)} in a forward of {images} images: images must come first")
        shape = x.shape if self.kept is None else (*x.shape[: self.kept], *(1 for _ in x.shape[self.kept :]))
        count = math.prod(shape) // max(images, 1)  # an image may be several rows, as in windowed attention
        draw = self.number * _FORWARDS + self.draw.forward
        uniform = rng.uniform(self.draw.seed, rng.Purpose.DROPOUT, self.draw.epoch, self.draw.ids, count, draw=draw)
        return x * (uniform.view(shape) >= self.p).to(x.dtype) / (1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p:g}, kept={self.kept}, number={self.number}"


def dropping_layers(module: nn.Module) -> list[CounterDropout]:
    """Return the layers of ``module`` that drop."""
    return [layer for layer in module.modules() if isinstance(layer, CounterDropout) and layer.p > 0]


@contextmanager
def drawing(module: nn.Module, draw: Draw | None) -> Iterator[None]:
    """Draw the masks of the forwards within the block by ``draw``; None leaves the network as it is."""
    if draw is None:
        yield
        return
    layers = dropping_layers(module)
    for layer in layers:
        layer.draw = draw
    try:
        yield
    finally:
        for layer in layers:
            layer.draw = None
