"""Builds the weights' optimiser from a recipe; rates change through ``schedules.py`` at every iteration."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from distributed_at.catalogue.optimizers import OPTIMIZERS
from distributed_at.config import OptimizerConfig
from distributed_at.engine.optimizer_rules import CentralisedSGD, TensorFlowRMSprop
from distributed_at.errors import ConfigError
from distributed_at.models import weight_decay_groups
from distributed_at.user_code import told_by_line


def build_optimizer(config: OptimizerConfig, model: nn.Module, *, lr: float) -> torch.optim.Optimizer:
    """Return the optimiser over the trainable parameters, weight decay by the recipe's rule.

    Weight decay is coupled (added to the gradient) for sgd, rmsprop and adam, decoupled for adamw, as in the papers'
    codes.
    """
    decay, no_decay = weight_decay_groups(model, config.weight_decay_rule)
    groups = [
        {"params": [p for _, p in named if p.requires_grad], "weight_decay": weight_decay}
        for named, weight_decay in ((decay, config.weight_decay), (no_decay, 0.0))
    ]
    groups = [g for g in groups if g["params"]]
    if not groups:
        raise ConfigError(
            "optimizer: no parameter is trainable under this recipe (train.bn_only with a net without BN?)"
        )
    with told_by_line(OPTIMIZERS.origin(config.name) or __file__):
        return config.facts.builder()(groups, config, lr)


def build_sgd(groups: list[dict[str, Any]], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Return SGD with momentum, of torch or of apex."""
    if config.backend == "apex":
        return _apex_sgd(groups, config, lr)
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov)


def build_sgd_gc(groups: list[dict[str, Any]], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Return SGD that centralises the gradients of convolutions and linear layers."""
    return CentralisedSGD(groups, lr=lr, momentum=config.momentum, least_dims=2)


def build_sgd_gcc(groups: list[dict[str, Any]], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Return SGD that centralises the gradients of convolutions alone."""
    return CentralisedSGD(groups, lr=lr, momentum=config.momentum, least_dims=4)


def build_rmsprop_tf(groups: list[dict[str, Any]], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Return RMSProp in TensorFlow's form."""
    return TensorFlowRMSprop(groups, lr=lr, decay=config.rmsprop_decay, momentum=config.momentum, eps=config.eps)


def build_rmsprop(groups: list[dict[str, Any]], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Return RMSprop."""
    return torch.optim.RMSprop(groups, lr=lr, alpha=config.rmsprop_decay, momentum=config.momentum, eps=config.eps)


def build_adam(groups: list[dict[str, Any]], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Return Adam."""
    return torch.optim.Adam(groups, lr=lr, betas=config.betas, eps=config.eps)


def build_adamw(groups: list[dict[str, Any]], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Return AdamW."""
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps)


def _apex_sgd(groups: list[dict[str, Any]], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """NVIDIA apex's fused SGD; the PyPI package that happens to be called apex is something else."""
    found = importlib.util.find_spec("apex")
    if found is None:
        raise ConfigError(
            "optimizer.backend: apex needs NVIDIA apex built from source (its README: pip install with --cpp_ext "
            "--cuda_ext); or write optimizer.backend: torch"
        )
    try:
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise ConfigError(
            f"optimizer.backend: apex found {found.origin or 'a package'}, which is not NVIDIA apex: the package of that "
            "name on the Python index is unrelated. Remove it (pip uninstall apex) and build NVIDIA apex from source, or "
            f"write optimizer.backend: torch ({error})"
        ) from error
    return FusedSGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov)
