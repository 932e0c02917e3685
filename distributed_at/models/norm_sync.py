"""Batch statistics over the samples of several ranks, with gradients, on any backend (gloo on CPU, NCCL on GPUs).

Gathers (mean, sum of squared deviations, count) once in the forward pass and sums two vectors once in the backward
pass. Ranks may hold different numbers of samples, also none, but each must take part in both passes.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

PER_CHANNEL = (0, 2, 3)


class _Layer(Protocol):
    """What is read of a batch norm layer, and written into its running statistics."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter
    running_mean: torch.Tensor
    running_var: torch.Tensor
    eps: float
    momentum: float
    process_group: dist.ProcessGroup | None

    @property
    def updates(self) -> bool: ...


class _Assign(torch.autograd.Function):
    """Writes a buffer from inside ``torch.func.grad``, which forbids in-place writes to what it has not been given."""

    @staticmethod
    def forward(value: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        buffer.copy_(value)
        return value.new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return None, None


def assign_buffer(buffer: torch.Tensor, value: torch.Tensor) -> None:
    """Copy ``value`` into ``buffer`` outside of autograd; also under ``torch.func.grad`` and ``torch.compile``."""
    with torch.no_grad():
        if torch.compiler.is_compiling():
            buffer.copy_(value)
        else:
            _Assign.apply(value.detach(), buffer)


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over the ranks of a group; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return _SumOverRanks.apply(grad, ctx.group), None


def _statistics(x: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return mean (C,), biased variance (C,) and count () over the samples of all ranks.

    Combines the ranks' means and squared deviations (Chan et al. 1983), which does not cancel as sums of squares do.
    """
    channels = x.shape[1]
    count = x.numel() // channels
    local_mean = x.sum(PER_CHANNEL) / max(count, 1)
    deviations = (x - local_mean.view(1, -1, 1, 1)).square().sum(PER_CHANNEL)
    local = torch.cat([local_mean, deviations, local_mean.new_full((1,), count)])
    world = dist.get_world_size(group)
    gathered = local.new_empty(world * local.numel())
    dist.all_gather_into_tensor(gathered, local, group=group)
    means, squares, counts = gathered.view(world, -1).split([channels, channels, 1], dim=1)  # (W, C), (W, C), (W, 1)
    total = counts.sum().clamp_min(1.0)
    mean = (counts * means).sum(0) / total
    var = (squares + counts * (means - mean).square()).sum(0) / total
    return mean, var, total


class _SynchronisedBatchNorm(torch.autograd.Function):
    """Normalisation by the statistics of all ranks of a layer's process group."""

    @staticmethod
    def forward(x: Any, weight: Any, bias: Any, layer: Any) -> Any:
        wide = x.to(weight.dtype)  # statistics in the parameters' precision, whatever autocast made of x
        mean, var, total = _statistics(wide, layer.process_group)
        if layer.updates:
            unbiased = var * (total / (total - 1).clamp_min(1.0))
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), layer.momentum)
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), layer.momentum)
        inverse_std = (var + layer.eps).rsqrt()
        scale = (weight * inverse_std).view(1, -1, 1, 1)
        out = (wide - mean.view(1, -1, 1, 1)) * scale + bias.view(1, -1, 1, 1)
        return out.to(x.dtype), mean, inverse_std, total

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, _, layer = inputs
        _, mean, inverse_std, total = output
        ctx.group = layer.process_group
        ctx.mark_non_differentiable(mean, inverse_std, total)
        ctx.save_for_backward(x, weight, mean, inverse_std, total)

    @staticmethod
    @once_differentiable  # mean and deviation are constants below: a second derivative would be silently wrong
    def backward(ctx: Any, grad_out: Any, *_unused: Any) -> Any:
        x, weight, mean, inverse_std, total = ctx.saved_tensors
        grad = grad_out.to(weight.dtype)
        normalised = (x.to(weight.dtype) - mean.view(1, -1, 1, 1)) * inverse_std.view(1, -1, 1, 1)
        grad_bias = grad.sum(PER_CHANNEL)
        grad_weight = (grad * normalised).sum(PER_CHANNEL)
        grad_x = None
        if ctx.needs_input_grad[0]:
            # every rank's loss depends on the statistics that this rank's samples have moved
            sums = _SumOverRanks.apply(torch.cat([grad_bias, grad_weight]), ctx.group) / total
            mean_grad, mean_product = sums.view(2, 1, -1, 1, 1)
            scale = (weight * inverse_std).view(1, -1, 1, 1)
            grad_x = ((grad - mean_grad - normalised * mean_product) * scale).to(x.dtype)
        # parameters get this rank's share alone: data parallelism adds the ranks' gradients itself
        return grad_x, grad_weight, grad_bias, None


def synchronised_batch_norm(x: torch.Tensor, layer: _Layer) -> torch.Tensor:
    """Return x (N, C, H, W) normalised by the batch statistics of all ranks of ``layer.process_group``."""
    return _SynchronisedBatchNorm.apply(x, layer.weight, layer.bias, layer)[0]
