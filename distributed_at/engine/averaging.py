"""Exponential moving average of the weights (Gowal et al., "Uncovering the limits", section 4.3)."""

from __future__ import annotations

import torch
from torch import nn

from distributed_at.config import EmaConfig
from distributed_at.models.norm import bn_buffers


class WeightAverage:
    """Averages parameters, and BN statistics where the recipe asks for it, after every optimiser step."""

    def __init__(self, module: nn.Module, config: EmaConfig) -> None:
        self._config = config
        self._live: dict[str, torch.Tensor] = dict(module.named_parameters())
        if config.buffers == "average":
            self._live.update({k: b for k, b in bn_buffers(module).items() if b.is_floating_point()})
        self.tensors = {name: value.detach().clone() for name, value in self._live.items()}

    def decay_at(self, step: int) -> float:
        """Decay of the update after ``step`` earlier ones; 'dynamic' warms up as min(decay, (1 + t) / (10 + t))."""
        if self._config.dynamic:
            return min(self._config.decay, (1 + step) / (10 + step))
        return self._config.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the live weights."""
        torch._foreach_lerp_(
            list(self.tensors.values()), [v.detach() for v in self._live.values()], 1 - self.decay_at(step)
        )

    @torch.no_grad()
    def copy_into(self, module: nn.Module) -> None:
        """Write the averaged tensors into a copy of the network (the live BN statistics stay where not averaged)."""
        targets: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name, value in self.tensors.items():
            targets[name].copy_(value)
