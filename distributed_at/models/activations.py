"""Activation functions by name, never in place: an in-place one breaks input gradients taken through function transforms."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from distributed_at.config import ModelConfig
from distributed_at.errors import ConfigError, did_you_mean

ACTIVATIONS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "relu": lambda config: nn.ReLU(),
    "leaky_relu": lambda config: nn.LeakyReLU(config.leaky_slope),
    "elu": lambda config: nn.ELU(),
    "celu": lambda config: nn.CELU(config.celu_alpha),
    "selu": lambda config: nn.SELU(),
    "gelu": lambda config: nn.GELU(),
    "silu": lambda config: nn.SiLU(),
    "softplus": lambda config: nn.Softplus(beta=config.softplus_beta),
    "tanh": lambda config: nn.Tanh(),
}


def build_activation(config: ModelConfig) -> nn.Module:
    """Return a new layer of the network's activation (x -> same shape).

    Raises:
        ConfigError: for a name that is not in ``ACTIVATIONS``.
    """
    if config.activation not in ACTIVATIONS:
        raise ConfigError(
            f"model.activation must be one of {list(ACTIVATIONS)}, got {config.activation!r}."
            f"{did_you_mean(config.activation, ACTIVATIONS)}"
        )
    return ACTIVATIONS[config.activation](config)
