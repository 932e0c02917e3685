"""Gives anybody's network our norm layers, in place of its ``nn.BatchNorm2d``, and our masks in place of its dropout.

Parameters and buffers are taken over as they are, so a converted network computes what it computed before, and its
batch norm gets the modes, groups, branches and merged statistics that training and attacks need. ``nn.LayerNorm`` and
``nn.GroupNorm`` need nothing: they treat each image alone.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distributed_at.catalogue.norms import NORMS
from distributed_at.config import ModelConfig
from distributed_at.errors import ConfigError
from distributed_at.models.branches import BranchedNorm
from distributed_at.models.dropout import CounterDropout
from distributed_at.models.norm import BatchNorm, GroupNorm, MixtureBatchNorm

_AFTER = ("drop", "act")  # what timm's norm layers run behind themselves


def convert_batch_norms(network: nn.Module, config: ModelConfig | None = None, *, strict: bool = True) -> nn.Module:
    """Return ``network`` (changed in place) with our layers where it had ``nn.BatchNorm2d``.

    Args:
        network: any module; layers of ours are left alone.
        config: its norm says what comes in their place (``Norm.take_over``): 'bn' shares the parameters and buffers of the
            layer that it replaces, 'mbn' gives each branch a copy of them, others begin anew. None = 'bn'.
        strict: refuse layers that cannot be taken over; otherwise they stay, which is right in eval mode.

    Raises:
        ConfigError: a batch norm that cannot be taken over (of another dimension, without affine parameters, without
            running statistics, or a subclass that does more than normalise), or none where ``norm`` needs one.
    """
    facts = NORMS["bn"] if config is None else config.norm_facts
    found = {name: layer for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}
    ours = any(isinstance(m, BranchedNorm) for m in network.modules())
    if facts.branches and not found and not ours:
        raise ConfigError(
            f"model.norm '{config.norm if config else 'bn'}' gives batch norm two branches, and {type(network).__name__} has no batch norm"
        )
    made: dict[int, nn.Module] = {}  # a layer that is called at several places stays one
    for name, layer in found.items():
        if id(layer) not in made:
            try:
                made[id(layer)] = _converted(
                    layer, name, lambda own: facts.instead_of(config or ModelConfig(arch="resnet50"), own)
                )
            except ConfigError:
                if strict:
                    raise
                made[id(layer)] = layer
        if not name:
            return made[id(layer)]
        network.set_submodule(name, made[id(layer)])
    return network


def _converted(layer: nn.Module, name: str, make: Callable[[nn.BatchNorm2d], nn.Module]) -> nn.Module:
    place = f"{name or 'the network'} ({type(layer).__name__})"
    if not isinstance(layer, nn.BatchNorm2d | nn.SyncBatchNorm):
        raise ConfigError(f"{place}: batch norm over images (nn.BatchNorm2d) can be taken over, this one cannot")
    if layer.weight is None or layer.running_mean is None or layer.momentum is None:
        raise ConfigError(
            f"{place}: batch norm is taken over with affine parameters, running statistics and a fixed momentum alone"
        )
    behind = [(part, getattr(layer, part)) for part in _AFTER if isinstance(getattr(layer, part, None), nn.Module)]
    if type(layer) not in (nn.BatchNorm2d, nn.SyncBatchNorm) and not behind:
        raise ConfigError(f"{place}: a batch norm that does more than nn.BatchNorm2d cannot be taken over")
    ours = make(cast(nn.BatchNorm2d, layer))
    if not behind:
        return ours
    return nn.Sequential(OrderedDict([("norm", ours), *behind])).train(layer.training)


def batch_norm(config: ModelConfig, layer: nn.BatchNorm2d) -> BatchNorm:
    """Return our layer around the very parameters and buffers of another one."""
    assert layer.momentum is not None
    assert layer.running_mean is not None
    assert layer.running_var is not None
    ours = BatchNorm(0, eps=layer.eps, momentum=layer.momentum)
    ours.num_features = layer.num_features
    ours.weight, ours.bias = layer.weight, layer.bias
    counter = layer.num_batches_tracked
    ours.running_mean, ours.running_var = layer.running_mean, layer.running_var
    ours.num_batches_tracked = torch.zeros((), dtype=torch.int64) if counter is None else counter
    return ours


def group_norm(config: ModelConfig, layer: nn.BatchNorm2d) -> GroupNorm:
    """Return a group norm of as many channels, which begins anew."""
    made = GroupNorm(config.groups, layer.num_features, eps=layer.eps)
    return made.to(layer.weight.device, layer.weight.dtype)


def mixture_batch_norm(config: ModelConfig, layer: nn.BatchNorm2d) -> MixtureBatchNorm:
    """Return two branches: the adversarial one around a layer's parameters and buffers, the clean one with a copy."""
    plain = batch_norm(config, layer)
    mixture = MixtureBatchNorm(0, eps=layer.eps, momentum=plain.momentum)
    mixture.clean, mixture.adv = copy.deepcopy(plain), plain
    return mixture


def convert_dropout(network: nn.Module) -> nn.Module:
    """Return ``network`` (changed in place) with masks from counters where it drops activations or whole branches.

    ``nn.Dropout`` (any dimension: whole channels stay whole), torchvision's ``StochasticDepth`` of rows and timm's
    ``DropPath``. Layers that drop nothing are left alone.

    Raises:
        ConfigError: attention or another layer that draws its masks inside.
    """
    number = 1 + max((m.number for m in network.modules() if isinstance(m, CounterDropout)), default=-1)
    for name, layer in list(network.named_modules()):
        probability, kept = _dropping(layer, name)
        if probability:
            network.set_submodule(name, CounterDropout(probability, kept=kept, number=number).train(layer.training))
            number += 1
    return network


def _dropping(layer: nn.Module, name: str) -> tuple[float, int | None]:
    """Return the probability that a layer drops, and how many leading dimensions share a mask; 0 for other layers."""
    kind = type(layer).__name__
    if isinstance(layer, nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.FeatureAlphaDropout):
        return layer.p, 2
    if isinstance(layer, nn.AlphaDropout):
        raise ConfigError(f"{name}: {kind} draws masks that no checkpoint holds; use nn.Dropout")
    if isinstance(layer, nn.Dropout):
        return layer.p, None
    if kind == "StochasticDepth":
        if getattr(layer, "p", 0.0) and getattr(layer, "mode", "row") != "row":
            raise ConfigError(f"{name}: StochasticDepth of mode 'batch' drops for all images at once; use mode 'row'")
        return float(getattr(layer, "p", 0.0)), 1
    if kind == "DropPath":
        return float(getattr(layer, "drop_prob", 0.0) or 0.0), 1
    if isinstance(layer, nn.MultiheadAttention) and layer.dropout:
        raise ConfigError(
            f"{name}: dropout inside nn.MultiheadAttention draws masks that no checkpoint holds; set it to 0"
        )
    return 0.0, None
