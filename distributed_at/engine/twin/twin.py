"""The twin: the attack's own view of the network (design invariant 4).

A copy of the module's structure whose parameters are detached views of the live ones, or copies of them that
``refresh`` brings up to date after each optimiser step: 16-bit, channels-last, frozen batch norm folded into the
convolutions. It fires no DeepSpeed hook, gathers no weight gradient and holds its own BN mode. Not for training.
"""

from __future__ import annotations

import copy
import logging

import torch
import torch.distributed as dist
from torch import nn

from distributed_at.config import BnMode
from distributed_at.engine.twin.folding import Sources, rewrite
from distributed_at.models.branches import set_branch
from distributed_at.models.convert import convert_batch_norms
from distributed_at.models.norm import set_bn_mode

_LOG = logging.getLogger(__name__)
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def aliased_copy(module: nn.Module) -> nn.Module:
    """Return a structural copy of ``module`` that shares its storage: parameters detached, buffers the same objects."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer
    for layer in module.modules():
        for value in vars(layer).values():
            if isinstance(value, dist.ProcessGroup):  # belongs to the process; it cannot be copied
                memo[id(value)] = value
    twin = copy.deepcopy(module, memo)
    # DeepSpeed leaves hooks on the live module's layers; the attack must not call them
    for layer in twin.modules():
        layer._forward_hooks.clear()
        layer._forward_pre_hooks.clear()
        layer._backward_hooks.clear()
        layer._backward_pre_hooks.clear()
    return twin


class Twin:
    """The network as the attack sees it. Call ``refresh`` after the live weights or statistics have changed.

    Args:
        module: the live network; with DeepSpeed ``engine.module`` *after* ``deepspeed.initialize``.
        bn_mode: 'eval' (running statistics), 'batch' (batch statistics, nothing updated) or 'train' (also updates the
            live running statistics, as several papers' codes do).
        branch: norm branch, 'adv' or 'clean'.
        dtype: 'fp32', or the 16-bit type of weights and activations; fp32 leaves a float64 network in float64.
        fold: put frozen batch norms into the convolutions before them (bn_mode 'eval' alone).
        channels_last: lay out weights and activations channels-last.
        fuse_group_norm: group norm and ReLU as one operation; None = on CUDA, where it has kernels.

    With ``fold`` and ``channels_last`` off, fp32 gradients are bitwise those of the live network. A network that
    torch.fx cannot trace runs as it is, under autocast for 16 bits.

    Attributes:
        module: images -> logits float32, an ``nn.Module`` for compilers; its tensors stay at their addresses.
        folded: how many batch norms were folded.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        bn_mode: BnMode,
        branch: str = "adv",
        dtype: str = "fp32",
        fold: bool = True,
        channels_last: bool = True,
        fuse_group_norm: bool | None = None,
    ) -> None:
        # of a network that is not ours; in eval mode a norm that cannot be taken over is right as it is
        network = convert_batch_norms(aliased_copy(module), strict=bn_mode != "eval")
        network.eval()
        set_bn_mode(network, bn_mode)
        set_branch(network, branch)
        self.branch = branch
        self.bn_mode = bn_mode
        self.dtype = dtype
        if fuse_group_norm is None:
            fuse_group_norm = next(network.parameters()).is_cuda
        self.module: nn.Module
        try:
            self.module, self._sources = rewrite(
                network,
                branch=branch,
                fold=fold and bn_mode == "eval",
                dtype=DTYPES[dtype],
                channels_last=channels_last,
                group_norm=fuse_group_norm,
            )
        except (torch.fx.proxy.TraceError, TypeError, ValueError, RuntimeError, NameError) as error:
            _LOG.warning(
                "%s cannot be traced (%s); its attack runs unfolded, which is right but slower",
                type(module).__name__,
                str(error).splitlines()[0] if str(error) else type(error).__name__,
            )
            self.module, self._sources = _Untraced(network, DTYPES[dtype]), Sources()
        _let_attention_fold(self.module)

    @property
    def folded(self) -> int:
        return len(self._sources.folded)

    def refresh(self) -> None:
        """Bring folded and cast copies up to date with the live network, in place; parameters that are views need none."""
        self._sources.refresh()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, K), float32 (float64 of a float64 network), of images (N, 3, H, W) in [0, 1]."""
        return self.module(x)


def _let_attention_fold(module: nn.Module) -> None:
    """Mark the matrices of ``nn.MultiheadAttention`` as wanting a gradient, which no attack asks for or computes.

    Its input is a transposed view, and torch multiplies such a one by a matrix without that mark image by image: twice
    the time of the whole attack of a ViT on a CPU.
    """
    for layer in module.modules():
        if isinstance(layer, nn.MultiheadAttention):
            for matrix in (layer.in_proj_weight, layer.out_proj.weight):
                if matrix is not None:
                    matrix.requires_grad_(True)


class _Untraced(nn.Module):
    """A network as it is, under autocast for 16 bits."""

    def __init__(self, network: nn.Module, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dtype is None:
            return self.network(x)
        with torch.autocast(x.device.type, dtype=self.dtype):
            return self.network(x).float()
