"""Group normalisation fused with ReLU, with a backward that computes only what is asked: the input's gradient in an
attack, the weights' too in training.

Triton kernels for channels-last CUDA tensors are in ``group_norm_triton.py``; elsewhere the same formulas run in plain
torch. Saved for the backward are the input and each group's mean and reciprocal deviation, not the output: the ReLU's
mask is computed again from the input.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction

from . import build

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def group_norm_relu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-5,
    relu: bool = True,
) -> torch.Tensor:
    """Return relu(group_norm(x)) (Wu & He 2018), or group_norm(x) where ``relu`` is false.

    Statistics are in float32 (float64 for float64 input) whatever the dtype of ``x``. Gradients of ``weight`` and
    ``bias`` are computed only where these require them: an attack on a frozen view of the weights reads the gradient
    and the input twice, writes the input's gradient once and sums nothing else. There is no second derivative.

    Args:
        x: (N, C, H, W); channels-last CUDA tensors take the Triton kernels.
        num_groups: divides C; each group is C / num_groups consecutive channels.
        weight, bias: (C,), of any floating dtype.
        eps: added to the variance.
        relu: whether to apply ReLU.

    Returns:
        (N, C, H, W) of the dtype and memory format of ``x``.

    Raises:
        ValueError: shapes do not fit, or ``num_groups`` does not divide C.
        TypeError: ``x`` is not floating.
    """
    if x.dim() != 4:
        raise ValueError(f"x must be (N, C, H, W), got {tuple(x.shape)}")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the {channels} channels, got {num_groups}")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"weight and bias must be ({channels},), got {tuple(weight.shape)} and {tuple(bias.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be floating, got {x.dtype}")
    return torch.ops.distributed_at.group_norm_relu(x, weight, bias, num_groups, float(eps), relu)[0]


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


@functools.cache
def _has_triton() -> bool:
    try:
        from . import group_norm_triton  # noqa: F401
    except ImportError:
        return False
    return True


def _uses_triton(x: torch.Tensor) -> bool:
    """Return whether ``x`` takes the Triton kernels: 16 or 32 bits, channels-last, on CUDA, kernels not switched off."""
    return (
        x.is_cuda
        and x.dtype != torch.float64
        and x.numel() > 0
        and _memory_format(x) is torch.channels_last
        and build.choice() != "off"
        and _has_triton()
    )


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _affine(x: torch.Tensor, *vectors: torch.Tensor) -> list[torch.Tensor]:
    """Return (C,) vectors as (1, C, 1, 1) of the computing dtype."""
    return [vector.to(_wide(x)).view(1, -1, 1, 1) for vector in vectors]


def _standardise(x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor) -> torch.Tensor:
    """Return (x - mean) * rstd, (N, C, H, W) of the computing dtype, for (N, G) statistics."""
    n, channels = x.shape[:2]
    per_channel = channels // mean.shape[1]
    mean = mean.repeat_interleave(per_channel, dim=1).view(n, channels, 1, 1)
    rstd = rstd.repeat_interleave(per_channel, dim=1).view(n, channels, 1, 1)
    return (x.to(_wide(x)) - mean) * rstd


def reference_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float, relu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y, and mean and rstd as (N, G), in plain torch."""
    groups = x.to(_wide(x)).reshape(x.shape[0], num_groups, x.shape[1] // num_groups * x.shape[2] * x.shape[3])
    if groups.numel() == 0:  # torch warns of the variance of nothing
        nothing = groups.new_zeros(groups.shape[:2])
        return torch.empty_like(x, memory_format=_memory_format(x)), nothing, nothing.clone()
    variance, mean = torch.var_mean(groups, dim=2, correction=0)
    rstd = (variance + eps).rsqrt()
    scale, shift = _affine(x, weight, bias)
    y = _standardise(x, mean, rstd) * scale + shift
    y = torch.relu(y) if relu else y
    return y.to(x.dtype).contiguous(memory_format=_memory_format(x)), mean, rstd


def reference_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    relu: bool,
    weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dx, and dweight and dbias as (C,) in the computing dtype, (0,) where ``weights`` is false."""
    n, channels, height, width = x.shape
    groups = mean.shape[1]
    scale, shift = _affine(x, weight, bias)
    normal = _standardise(x, mean, rstd)
    dz = dy.to(_wide(x))
    if relu:
        dz = torch.where(normal * scale + shift > 0, dz, torch.zeros_like(dz))
    # per sample and channel: all that dweight, dbias and the two group means of dx need
    sum_dz = dz.sum(dim=(2, 3))
    sum_dz_normal = (dz * normal).sum(dim=(2, 3))
    count = channels // groups * height * width
    scale_row = scale.view(1, -1)

    def group_mean(sums: torch.Tensor) -> torch.Tensor:
        per_group = (sums * scale_row).view(n, groups, channels // groups).sum(dim=2) / count
        return per_group.repeat_interleave(channels // groups, dim=1).view(n, channels, 1, 1)

    rstd_channel = rstd.repeat_interleave(channels // groups, dim=1).view(n, channels, 1, 1)
    dx = rstd_channel * (dz * scale - group_mean(sum_dz) - normal * group_mean(sum_dz_normal))
    dx = dx.to(x.dtype).contiguous(memory_format=_memory_format(x))
    if weights:
        return dx, sum_dz_normal.sum(dim=0), sum_dz.sum(dim=0)
    return dx, sum_dz.new_empty(0), sum_dz.new_empty(0)


# Defined key by key rather than by ``custom_op``: torch 2.11's own derivative of a custom op is refused by
# torch.func.grad, which compiled attacks use.
_LIBRARY = torch.library.Library("distributed_at", "FRAGMENT")
_LIBRARY.define(
    "group_norm_relu(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, bool relu) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "group_norm_relu", "CompositeExplicitAutograd")
def _forward_impl(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float, relu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if _uses_triton(x):
        from . import group_norm_triton

        return group_norm_triton.forward(x, weight, bias, num_groups, eps, relu)
    return reference_forward(x, weight, bias, num_groups, eps, relu)


@torch.library.register_fake("distributed_at::group_norm_relu", lib=_LIBRARY)
def _(x: Any, weight: Any, bias: Any, num_groups: Any, eps: Any, relu: Any) -> Any:
    statistics = [x.new_empty((x.shape[0], num_groups), dtype=_wide(x)) for _ in range(2)]
    return torch.empty_like(x, memory_format=_memory_format(x)), *statistics


@torch.library.custom_op("distributed_at::group_norm_relu_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor,
    rstd: torch.Tensor, relu: bool, weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    if _uses_triton(x):
        from . import group_norm_triton

        dy = dy.contiguous(memory_format=torch.channels_last)
        return group_norm_triton.backward(dy, x, weight, bias, mean, rstd, relu, weights)
    return reference_backward(dy, x, weight, bias, mean, rstd, relu, weights)


@_backward_op.register_fake
def _(dy: Any, x: Any, weight: Any, bias: Any, mean: Any, rstd: Any, relu: Any, weights: Any) -> Any:
    vectors = [x.new_empty((x.shape[1] if weights else 0,), dtype=_wide(x)) for _ in range(2)]
    return torch.empty_like(x, memory_format=_memory_format(x)), *vectors


class _GroupNormReLU(_SingleLevelFunction):
    """The derivative of the op, at one level of functorch, as torch's own operators have theirs."""

    @staticmethod
    def forward(x: Any, weight: Any, bias: Any, num_groups: Any, eps: Any, relu: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.distributed_at.group_norm_relu(x, weight, bias, num_groups, eps, relu)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, _, _, relu = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.relu = relu

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Any, _dmean: Any, _drstd: Any) -> Any:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        dx, dweight, dbias = _backward_op(dy, x, weight, bias, mean, rstd, ctx.relu, weights)
        if not weights:
            return dx, None, None, None, None, None
        return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None


@torch.library.impl(_LIBRARY, "group_norm_relu", "Autograd")
def _differentiable(x: Any, weight: Any, bias: Any, num_groups: Any, eps: Any, relu: Any) -> Any:
    with enable_single_level_autograd_function():  # functorch has peeled off its level before it comes here
        return _GroupNormReLU.apply(x, weight, bias, num_groups, eps, relu)  # type: ignore[attr-defined]
