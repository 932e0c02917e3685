"""Networks for adversarial training: ResNets, pre-activation and wide ResNets, whose mixture norms hold the branch.

Usable alone: ``build_model(ModelConfig(arch="resnet50"), num_classes=1000)(x)``.
"""

from distributed_at.catalogue.networks import LAYOUTS
from distributed_at.models.branches import BRANCHES, on_branch, set_branch
from distributed_at.models.norm import (
    BatchNorm,
    GroupNorm,
    MixtureBatchNorm,
    bn_buffers,
    norm_layers,
    set_bn_mode,
    set_group_size,
    set_process_group,
)
from distributed_at.models.parameters import load_torchvision_state_dict, weight_decay_groups
from distributed_at.models.registry import build_model
from distributed_at.models.statistics import ModelStatistics, measure

__all__ = [
    "BRANCHES",
    "LAYOUTS",
    "BatchNorm",
    "GroupNorm",
    "MixtureBatchNorm",
    "ModelStatistics",
    "bn_buffers",
    "build_model",
    "load_torchvision_state_dict",
    "measure",
    "norm_layers",
    "on_branch",
    "set_bn_mode",
    "set_branch",
    "set_group_size",
    "set_process_group",
    "weight_decay_groups",
]
