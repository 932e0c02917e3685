"""How weights start: the rules of the papers' codes, drawn from torch's global generator (seed it before)."""

from __future__ import annotations

import math

import torch
from torch import nn

from distributed_at.config import ModelConfig
from distributed_at.errors import ConfigError
from distributed_at.models.norm import BatchNorm, GroupNorm, norm_layers
from distributed_at.models.resnet import BasicBlock, Bottleneck

# standard deviation of a standard normal variable truncated at two
TRUNCATED_STD = 0.87962566103423978


def _fan_out(conv: nn.Conv2d) -> int:
    return conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels


def _torchvision(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _xie(layer: nn.Module) -> None:
    """Xie & Yuille's code: truncated normal of variance 2 / fan_out, classifier N(0, 0.01)."""
    if isinstance(layer, nn.Conv2d):
        std = math.sqrt(2.0 / _fan_out(layer)) / TRUNCATED_STD
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)


def _wrn(layer: nn.Module) -> None:
    """The codes of TRADES and Bag of tricks: N(0, sqrt(2 / (k k out))), bias of the classifier 0."""
    if isinstance(layer, nn.Conv2d):
        nn.init.normal_(layer.weight, std=math.sqrt(2.0 / _fan_out(layer)))
    elif isinstance(layer, nn.Linear):
        nn.init.zeros_(layer.bias)


def _torch(layer: nn.Module) -> None:
    """What torch's layers do on their own, as the pre-activation ResNets of the CIFAR codes leave it."""


RULES = {"torchvision": _torchvision, "xie": _xie, "wrn": _wrn, "torch": _torch}
FAMILY_RULES = {"resnet": "torchvision", "preact_resnet": "torch", "wide_resnet": "wrn"}


@torch.no_grad()
def initialise(model: nn.Module, config: ModelConfig, *, family: str) -> None:
    """Initialise a new network by ``config.init``; 'default' is the family's own rule.

    ``zero_init_gamma`` sets the scale of the norm that ends each residual branch to 0 (Goyal et al. 2017), in both
    halves of a mixture; a rule never does so by itself.

    Raises:
        ConfigError: for zero_init_gamma in a pre-activation network, whose residual branches end in a convolution.
    """
    rule = RULES[FAMILY_RULES[family] if config.init == "default" else config.init]
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear | BatchNorm | GroupNorm):
            layer.reset_parameters()
            rule(layer)
    if not config.zero_init_gamma:
        return
    if family != "resnet":
        raise ConfigError(
            f"model.zero_init_gamma needs a net whose residual branches end in a norm layer (resnet*), got {config.arch!r}"
        )
    for block in model.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            for layer in norm_layers(block.last_norm):
                layer.weight.zero_()
