"""Normalisation layers: batch norm with modes and groups, mixture batch norm, group norm.

Also the switches over a whole network: BN mode, group size, process group. Merging buffers over ranks is not done here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from distributed_at.config import ModelConfig
from distributed_at.errors import ConfigError, did_you_mean
from distributed_at.models.branches import BRANCHES, Branch, BranchedNorm, check_branch
from distributed_at.models.norm_sync import assign_buffer, synchronised_batch_norm

BnMode = Literal["eval", "batch", "train"]
NormFactory = Callable[[int], nn.Module]

BN_MODES: tuple[str, ...] = get_args(BnMode)


class BatchNorm(nn.Module):
    """Batch normalisation over (N, H, W) with one set of statistics, which both branches share.

    The layer holds its own mode, whatever the rest of the network does:

    * ``train``: batch statistics; the running ones move once per forward,
    * ``batch``: batch statistics; the buffers stay bitwise what they were,
    * ``eval``: running statistics. With trainable ``weight`` and ``bias`` this is Xie & Yuille's (2020, section 4.3)
      training with pre-computed statistics.

    ``module.train()`` and ``module.eval()`` set ``train`` and ``eval``; ``set_bn_mode`` sets any of them.

    Attributes:
        group_size: samples whose statistics are taken together. A larger batch is cut into consecutive groups, the last
            may be smaller; the running statistics then move to the sample-weighted mean of what each group alone would
            have made of them. None = the whole batch.
        shares: what each group of the batch counts in the running statistics; None = by its samples.
        process_group: ranks whose batches form one group; their statistics are synchronised, with gradients. It then
            stands for the whole group, and ``group_size`` does not cut the local batch.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.mode: BnMode = "train"
        self.group_size: int | None = None
        self.shares: tuple[float, ...] | None = None
        self.process_group: dist.ProcessGroup | None = None
        self.recomputing = False
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.register_buffer("running_mean", torch.empty(num_features))
        self.register_buffer("running_var", torch.empty(num_features))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the affine map to the identity and the running statistics to mean 0, variance 1."""
        with torch.no_grad():
            self.weight.fill_(1.0)
            self.bias.zero_()
            self.running_mean.zero_()
            self.running_var.fill_(1.0)
            self.num_batches_tracked.zero_()

    @property
    def group_world(self) -> int:
        """Ranks that share this layer's statistics; 1 where nothing is synchronised."""
        return 1 if self.process_group is None else dist.get_world_size(self.process_group)

    @property
    def updates(self) -> bool:
        """Whether a forward moves the running statistics; a recomputed forward has already moved them."""
        return self.mode == "train" and not self.recomputing

    def train(self, mode: bool = True) -> BatchNorm:
        """Set the BN mode together with the module's training flag."""
        super().train(mode)
        self.mode = "train" if mode else "eval"
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (N, C, H, W) normalised."""
        if self.mode == "eval":
            return self._frozen(x)
        if self.process_group is not None and self.group_world > 1:
            self._count_batch()
            return synchronised_batch_norm(x, self)
        if x.shape[0] == 0:  # a rank without samples in an incomplete last batch
            return self._frozen(x)
        self._count_batch()
        if self.shares is not None or (self.group_size is not None and x.shape[0] > self.group_size):
            return self._grouped(x, self.group_size or x.shape[0])
        if self.mode == "batch":
            return self._batch(x, None, None)
        if self.recomputing:  # the same saved tensors as in the first forward, but nobody's buffers
            return self._batch(x, self.running_mean.clone(), self.running_var.clone())
        return self._batch(x, self.running_mean, self.running_var)

    def _frozen(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _batch(self, x: torch.Tensor, mean: torch.Tensor | None, var: torch.Tensor | None) -> torch.Tensor:
        return F.batch_norm(x, mean, var, self.weight, self.bias, True, self.momentum, self.eps)

    def _grouped(self, x: torch.Tensor, group_size: int) -> torch.Tensor:
        """Normalise consecutive groups on their own; the update is linear, so its mean over groups is one update."""
        outputs = []
        mean_step = torch.zeros_like(self.running_mean)
        var_step = torch.zeros_like(self.running_var)
        for index, group in enumerate(x.split(group_size)):
            if self.mode == "batch":
                outputs.append(self._batch(group, None, None))
                continue
            mean, var = self.running_mean.clone(), self.running_var.clone()
            outputs.append(self._batch(group, mean, var))
            share = group.shape[0] / x.shape[0] if self.shares is None else self.shares[index]
            mean_step = mean_step + share * (mean - self.running_mean)
            var_step = var_step + share * (var - self.running_var)
        if self.updates:
            assign_buffer(self.running_mean, self.running_mean + mean_step)
            assign_buffer(self.running_var, self.running_var + var_step)
        return torch.cat(outputs)

    def _count_batch(self) -> None:
        if self.updates:
            assign_buffer(self.num_batches_tracked, self.num_batches_tracked + 1)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, group_size={self.group_size}"

    def __deepcopy__(self, memo: dict[int, object]) -> BatchNorm:
        if self.process_group is not None:  # it belongs to the process; a copy of the layer uses the same one
            memo[id(self.process_group)] = self.process_group
        duplicate = self.__class__.__new__(self.__class__)
        memo[id(self)] = duplicate
        duplicate.__dict__ = copy.deepcopy(self.__dict__, memo)
        return duplicate


class MixtureBatchNorm(BranchedNorm):
    """Two full batch norms, statistics and affine parameters, chosen by the branch (Xie & Yuille 2020, section 4.2).

    Inputs of one branch never touch the statistics or parameters of the other.
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.clean = BatchNorm(num_features, eps=eps, momentum=momentum)
        self.adv = BatchNorm(num_features, eps=eps, momentum=momentum)

    def serving(self, branch: str) -> BatchNorm:
        check_branch(branch)
        return self.clean if branch == "clean" else self.adv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (N, C, H, W) normalised by the branch's own layer."""
        return self.serving(self.branch)(x)


class GroupNorm(nn.GroupNorm):
    """Group normalisation (Wu & He 2018): per sample, so it has no running statistics, no modes and no branches."""

    def __init__(self, groups: int, num_channels: int, *, eps: float = 1e-5) -> None:
        if num_channels % groups:
            allowed = [g for g in range(1, num_channels + 1) if num_channels % g == 0]
            raise ConfigError(
                f"model.groups {groups} does not divide the {num_channels} channels of a norm layer; "
                f"allowed for it: {', '.join(map(str, allowed))}"
            )
        super().__init__(groups, num_channels, eps=eps)


def make_batch_norm(config: ModelConfig, channels: int) -> nn.Module:
    """Return a layer of norm 'bn'."""
    return BatchNorm(channels, eps=config.bn_eps, momentum=config.bn_momentum)


def make_mixture_batch_norm(config: ModelConfig, channels: int) -> nn.Module:
    """Return a layer of norm 'mbn'."""
    return MixtureBatchNorm(channels, eps=config.bn_eps, momentum=config.bn_momentum)


def make_group_norm(config: ModelConfig, channels: int) -> nn.Module:
    """Return a layer of norm 'gn'."""
    return GroupNorm(config.groups, channels, eps=config.bn_eps)


def norm_factory(config: ModelConfig) -> NormFactory:
    """Return the function that makes a norm layer of a given width for this network."""
    facts = config.norm_facts
    return lambda channels: facts.make(config, channels)


def norm_layers(module: nn.Module) -> list[BatchNorm | GroupNorm]:
    """Return the layers that hold norm parameters: every BatchNorm (both of a mixture) and GroupNorm."""
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm | GroupNorm)]


def bn_layers(module: nn.Module, branch: str | None = None) -> Iterator[BatchNorm]:
    """Yield the batch norms that serve ``branch``: those of its side of every mixture, and all plain ones."""
    if branch is not None:
        check_branch(branch)
    other = {
        id(getattr(layer, name))
        for layer in module.modules()
        if isinstance(layer, MixtureBatchNorm)
        for name in BRANCHES
        if branch is not None and name != branch
    }
    for layer in module.modules():
        if isinstance(layer, BatchNorm) and id(layer) not in other:
            yield layer


def set_bn_mode(module: nn.Module, mode: BnMode, branch: Branch | None = None) -> None:
    """Set the mode of every batch norm in ``module``, or of those that serve one branch; group norm has no modes.

    A plain batch norm serves both branches and is set whichever is named.

    Raises:
        ConfigError: for a mode or a branch that does not exist.
    """
    if mode not in BN_MODES:
        raise ConfigError(f"BN mode must be one of {list(BN_MODES)}, got {mode!r}.{did_you_mean(mode, BN_MODES)}")
    for layer in bn_layers(module, branch):
        layer.mode = mode


def set_group_size(module: nn.Module, group_size: int | None) -> None:
    """Set how many samples' statistics are taken together in every batch norm; None = the whole batch."""
    if group_size is not None and group_size < 1:
        raise ConfigError(f"BN group size must be at least 1, got {group_size}")
    for layer in bn_layers(module):
        layer.group_size = group_size


@contextmanager
def group_shares(module: nn.Module, shares: tuple[float, ...] | None) -> Iterator[None]:
    """Within it the groups of a batch move the running statistics by these shares; None = by their samples."""
    layers = [] if shares is None else list(bn_layers(module))
    for layer in layers:
        layer.shares = shares
    try:
        yield
    finally:
        for layer in layers:
            layer.shares = None


def set_process_group(module: nn.Module, process_group: dist.ProcessGroup | None) -> None:
    """Synchronise every batch norm's statistics over these ranks; None = each rank for itself."""
    for layer in bn_layers(module):
        layer.process_group = process_group


def bn_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return name -> running_mean, running_var or num_batches_tracked of every batch norm, the live tensors."""
    return {
        f"{name}.{key}" if name else key: buffer
        for name, layer in module.named_modules()
        if isinstance(layer, BatchNorm)
        for key, buffer in layer.named_buffers(recurse=False)
    }
