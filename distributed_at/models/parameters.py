"""Parameters by kind and by name: which of them weight decay reaches, and weights published for torchvision's ResNets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from distributed_at.errors import ConfigError, did_you_mean
from distributed_at.models.branches import BRANCHES
from distributed_at.models.norm import MixtureBatchNorm, norm_layers

NamedParameters = list[tuple[str, nn.Parameter]]
_OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)  # of networks that are not ours, and of plug-ins
DECAY_RULES = ("all", "no_norm_bias", "kernels")


def weight_decay_groups(model: nn.Module, rule: str) -> tuple[NamedParameters, NamedParameters]:
    """Split the named parameters into those with and those without weight decay.

    Args:
        model: the network.
        rule: 'all' (Bag of tricks), 'no_norm_bias' (all but norm layers and biases), or 'kernels' (convolution and
            linear kernels alone, as in Xie & Yuille's code).

    Returns:
        (decay, no_decay), each a list of (name, parameter) in the model's order; together every parameter once.

    Raises:
        ConfigError: for a rule that does not exist.
    """
    if rule not in DECAY_RULES:
        raise ConfigError(
            f"optimizer.weight_decay_rule must be one of {list(DECAY_RULES)}, got {rule!r}."
            f"{did_you_mean(rule, DECAY_RULES)}"
        )
    norms = [*norm_layers(model), *(layer for layer in model.modules() if isinstance(layer, _OTHER_NORMS))]
    of_norms = {id(p) for layer in norms for p in layer.parameters()}
    kernels = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    kernels |= {id(layer.in_proj_weight) for layer in model.modules() if isinstance(layer, nn.MultiheadAttention)}
    decay: NamedParameters = []
    no_decay: NamedParameters = []
    for name, parameter in model.named_parameters():
        if rule == "all":
            decays = True
        elif rule == "kernels":
            decays = id(parameter) in kernels
        else:
            decays = id(parameter) not in of_norms and name.rsplit(".", 1)[-1] != "bias"
        (decay if decays else no_decay).append((name, parameter))
    return decay, no_decay


def load_torchvision_state_dict(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Copy the weights of a torchvision ResNet of the same layout into ``model``; nothing is copied on an error.

    Both halves of a mixture batch norm get the one set of statistics and affine parameters. The names of plain batch
    norm are torchvision's own, so a state dict of such a ``model`` loads into torchvision as it is.

    Raises:
        ConfigError: where names or shapes differ, naming the first few.
    """
    mixtures = [name for name, layer in model.named_modules() if isinstance(layer, MixtureBatchNorm)]
    renamed = dict(state_dict)
    for mixture in mixtures:
        for key in [key for key in state_dict if key.rsplit(".", 1)[0] == mixture]:
            value = renamed.pop(key)
            for branch in BRANCHES:
                renamed[f"{mixture}.{branch}.{key.rsplit('.', 1)[1]}"] = value
    own = model.state_dict()
    problems = [f"no {name}" for name in own if name not in renamed]
    problems += [f"unknown {name}" for name in renamed if name not in own]
    problems += [
        f"{name} is {tuple(renamed[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in renamed and renamed[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise ConfigError(f"the weights do not belong to this network ({type(model).__name__}): {shown}")
    model.load_state_dict(renamed)
