"""Triton kernels of group norm + ReLU for channels-last tensors; the formulas and the autograd are in ``group_norm.py``.

Each program reads whole rows of channels, so memory is read in order although a group is strided in it. A sample is
cut into slices of pixels; slices are merged in a fixed order, without atomics, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Triton reads the annotations of a kernel as words of its own, so its arguments carry none of ours.
_TILE = 4096  # elements of (pixels, channels) that a program holds at once
_MAX_CHANNELS = 128  # channels a program handles; further channels are further programs
_SLICE_TARGET = 1024  # programs wanted, enough to fill a GPU


@triton.jit
def _slice_moments(  # type: ignore[no-untyped-def]
    x, means, squares, pixels, channels, slice_pixels, slices, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Write mean and sum of squared deviations of each channel of one slice of one sample."""
    sample, piece = tl.program_id(0) // slices, tl.program_id(0) % slices
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = x + sample.to(tl.int64) * pixels * channels
    first = piece * slice_pixels
    last = tl.minimum(first + slice_pixels, pixels)
    count = 0.0
    mean = tl.zeros((BLOCK_C,), tl.float32)
    square = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p[:, None] < last) & (c[None, :] < channels)
        tile = tl.load(base + p[:, None].to(tl.int64) * channels + c[None, :], inside, 0.0).to(tl.float32)
        tile_count = tl.minimum(last - start, BLOCK_P).to(tl.float32)
        tile_mean = tl.sum(tile, 0) / tile_count
        deviation = tl.where(inside, tile - tile_mean[None, :], 0.0)
        # Chan, Golub & LeVeque: moments of a union from the moments of its parts, without cancellation
        total = count + tile_count
        delta = tile_mean - mean
        square += tl.sum(deviation * deviation, 0) + delta * delta * (count * tile_count / total)
        mean += delta * (tile_count / total)
        count = total
    out = (sample.to(tl.int64) * slices + piece) * channels + c
    tl.store(means + out, mean, c < channels)
    tl.store(squares + out, square, c < channels)


@triton.jit
def _merge_moments(  # type: ignore[no-untyped-def]
    means, squares, mean_out, rstd_out, eps, pixels, channels, slice_pixels, slices, group_channels, groups,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge the slices and channels of one group of one sample into its mean and reciprocal deviation."""
    sample, group = tl.program_id(0), tl.program_id(1)
    parts = slices * group_channels
    base = sample.to(tl.int64) * slices * channels + group * group_channels
    total = tl.full((), 1.0, tl.float32) * pixels * group_channels  # either may be the constant 1
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        piece = part // group_channels
        at = base + piece.to(tl.int64) * channels + part % group_channels
        count = tl.minimum(pixels - piece * slice_pixels, slice_pixels).to(tl.float32)
        weighted += tl.where(part < parts, count, 0.0) * tl.load(means + at, part < parts, 0.0)
    mean = tl.sum(weighted, 0) / total
    spread = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        piece = part // group_channels
        at = base + piece.to(tl.int64) * channels + part % group_channels
        count = tl.minimum(pixels - piece * slice_pixels, slice_pixels).to(tl.float32)
        delta = tl.load(means + at, part < parts, 0.0) - mean
        spread += tl.where(part < parts, tl.load(squares + at, part < parts, 0.0) + count * delta * delta, 0.0)
    tl.store(mean_out + sample * groups + group, mean)
    tl.store(rstd_out + sample * groups + group, 1.0 / tl.sqrt(tl.sum(spread, 0) / total + eps))


@triton.jit
def _apply(  # type: ignore[no-untyped-def]
    x, y, weight, bias, mean, rstd, pixels, channels, slice_pixels, slices, group_channels, groups,
    RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write y = relu((x - mean) * rstd * weight + bias) for one slice of one sample."""
    sample, piece = tl.program_id(0) // slices, tl.program_id(0) % slices
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = c < channels
    statistic = sample * groups + c // group_channels
    m = tl.load(mean + statistic, present, 0.0)
    r = tl.load(rstd + statistic, present, 0.0)
    w = tl.load(weight + c, present, 0.0).to(tl.float32)
    b = tl.load(bias + c, present, 0.0).to(tl.float32)
    base = sample.to(tl.int64) * pixels * channels
    first = piece * slice_pixels
    last = tl.minimum(first + slice_pixels, pixels)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p[:, None] < last) & present[None, :]
        at = base + p[:, None].to(tl.int64) * channels + c[None, :]
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        result = ((value - m[None, :]) * r[None, :]) * w[None, :] + b[None, :]
        if RELU:
            result = tl.where(result > 0.0, result, tl.where(result != result, result, 0.0))
        tl.store(y + at, result.to(y.dtype.element_ty), inside)


@triton.jit
def _slice_gradients(  # type: ignore[no-untyped-def]
    dy, x, weight, bias, mean, rstd, sums, sums_normal, pixels, channels, slice_pixels, slices, group_channels, groups,
    RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write, for each channel of one slice, the sum of dz and of dz * normal, dz being dy behind the ReLU."""
    sample, piece = tl.program_id(0) // slices, tl.program_id(0) % slices
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = c < channels
    statistic = sample * groups + c // group_channels
    m = tl.load(mean + statistic, present, 0.0)
    r = tl.load(rstd + statistic, present, 0.0)
    w = tl.load(weight + c, present, 0.0).to(tl.float32)
    b = tl.load(bias + c, present, 0.0).to(tl.float32)
    base = sample.to(tl.int64) * pixels * channels
    first = piece * slice_pixels
    last = tl.minimum(first + slice_pixels, pixels)
    sum_dz = tl.zeros((BLOCK_C,), tl.float32)
    sum_dz_normal = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p[:, None] < last) & present[None, :]
        at = base + p[:, None].to(tl.int64) * channels + c[None, :]
        normal = (tl.load(x + at, inside, 0.0).to(tl.float32) - m[None, :]) * r[None, :]
        dz = tl.load(dy + at, inside, 0.0).to(tl.float32)
        if RELU:
            dz = tl.where(normal * w[None, :] + b[None, :] > 0.0, dz, 0.0)
        sum_dz += tl.sum(dz, 0)
        sum_dz_normal += tl.sum(dz * normal, 0)
    out = (sample.to(tl.int64) * slices + piece) * channels + c
    tl.store(sums + out, sum_dz, present)
    tl.store(sums_normal + out, sum_dz_normal, present)


@triton.jit
def _merge_gradients(  # type: ignore[no-untyped-def]
    sums, sums_normal, weight, group_mean, group_mean_normal, pixels, channels, slices, group_channels, groups,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge slices and channels of one group into the two means that dx needs."""
    sample, group = tl.program_id(0), tl.program_id(1)
    parts = slices * group_channels
    base = sample.to(tl.int64) * slices * channels + group * group_channels
    first = tl.zeros((BLOCK,), tl.float32)
    second = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        channel = part % group_channels
        at = base + (part // group_channels).to(tl.int64) * channels + channel
        w = tl.load(weight + group * group_channels + channel, part < parts, 0.0).to(tl.float32)
        first += w * tl.load(sums + at, part < parts, 0.0)
        second += w * tl.load(sums_normal + at, part < parts, 0.0)
    total = tl.full((), 1.0, tl.float32) * pixels * group_channels  # either may be the constant 1
    tl.store(group_mean + sample * groups + group, tl.sum(first, 0) / total)
    tl.store(group_mean_normal + sample * groups + group, tl.sum(second, 0) / total)


@triton.jit
def _input_gradient(  # type: ignore[no-untyped-def]
    dy, x, dx, weight, bias, mean, rstd, group_mean, group_mean_normal, pixels, channels, slice_pixels, slices,
    group_channels, groups, RELU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write dx = rstd * (dz * weight - mean(dz * weight) - normal * mean(dz * weight * normal))."""
    sample, piece = tl.program_id(0) // slices, tl.program_id(0) % slices
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = c < channels
    statistic = sample * groups + c // group_channels
    m = tl.load(mean + statistic, present, 0.0)
    r = tl.load(rstd + statistic, present, 0.0)
    g = tl.load(group_mean + statistic, present, 0.0)
    g_normal = tl.load(group_mean_normal + statistic, present, 0.0)
    w = tl.load(weight + c, present, 0.0).to(tl.float32)
    b = tl.load(bias + c, present, 0.0).to(tl.float32)
    base = sample.to(tl.int64) * pixels * channels
    first = piece * slice_pixels
    last = tl.minimum(first + slice_pixels, pixels)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p[:, None] < last) & present[None, :]
        at = base + p[:, None].to(tl.int64) * channels + c[None, :]
        normal = (tl.load(x + at, inside, 0.0).to(tl.float32) - m[None, :]) * r[None, :]
        dz = tl.load(dy + at, inside, 0.0).to(tl.float32)
        if RELU:
            dz = tl.where(normal * w[None, :] + b[None, :] > 0.0, dz, 0.0)
        result = r[None, :] * (dz * w[None, :] - g[None, :] - normal * g_normal[None, :])
        tl.store(dx + at, result.to(dx.dtype.element_ty), inside)


class _Plan:
    """How one tensor is cut: channels and pixels of a tile, pixels of a slice, and the grid."""

    def __init__(self, x: torch.Tensor, groups: int) -> None:
        n, self.channels, height, width = x.shape
        self.pixels = height * width
        self.groups = groups
        self.group_channels = self.channels // groups
        self.block_c = min(_MAX_CHANNELS, triton.next_power_of_2(self.channels))
        self.block_p = max(1, min(_TILE // self.block_c, triton.next_power_of_2(self.pixels)))
        columns = triton.cdiv(self.channels, self.block_c)
        wanted = max(1, _SLICE_TARGET // max(1, n * columns))
        tiles = triton.cdiv(self.pixels, self.block_p)
        self.slice_pixels = triton.cdiv(tiles, min(wanted, tiles)) * self.block_p
        self.slices = triton.cdiv(self.pixels, self.slice_pixels)
        self.grid = (n * self.slices, columns)
        self.merge_grid = (n, groups)
        self.merge_block = min(1024, triton.next_power_of_2(self.slices * self.group_channels))
        self.tile = {"BLOCK_P": self.block_p, "BLOCK_C": self.block_c}
        self.partial_shape = (2, n, self.slices, self.channels)
        self.cut = (self.pixels, self.channels, self.slice_pixels, self.slices)
        self.grouping = (self.group_channels, groups)


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float, relu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y, mean and rstd as ``group_norm.reference_forward`` does, for channels-last ``x``."""
    plan = _Plan(x, num_groups)
    weight, bias = weight.contiguous(), bias.contiguous()
    means, squares = torch.empty(plan.partial_shape, dtype=torch.float32, device=x.device)
    mean, rstd = (torch.empty((x.shape[0], num_groups), dtype=torch.float32, device=x.device) for _ in range(2))
    y = torch.empty_like(x)
    _slice_moments[plan.grid](x, means, squares, *plan.cut, **plan.tile)
    _merge_moments[plan.merge_grid](means, squares, mean, rstd, eps, *plan.cut, *plan.grouping, BLOCK=plan.merge_block)
    _apply[plan.grid](x, y, weight, bias, mean, rstd, *plan.cut, *plan.grouping, RELU=relu, **plan.tile)
    return y, mean, rstd


def backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor,
    rstd: torch.Tensor, relu: bool, weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return dx, dweight and dbias as ``group_norm.reference_backward`` does, for channels-last ``dy`` and ``x``."""
    plan = _Plan(x, mean.shape[1])
    weight, bias = weight.contiguous(), bias.contiguous()
    affine = (weight, bias, mean, rstd)
    sums, sums_normal = torch.empty(plan.partial_shape, dtype=torch.float32, device=x.device)
    group_mean, group_mean_normal = torch.empty_like(mean), torch.empty_like(mean)
    dx = torch.empty_like(x)
    _slice_gradients[plan.grid](dy, x, *affine, sums, sums_normal, *plan.cut, *plan.grouping, RELU=relu, **plan.tile)
    _merge_gradients[plan.merge_grid](
        sums, sums_normal, weight, group_mean, group_mean_normal, plan.pixels, plan.channels, plan.slices,
        *plan.grouping, BLOCK=plan.merge_block,
    )  # fmt: skip
    _input_gradient[plan.grid](
        dy, x, dx, *affine, group_mean, group_mean_normal, *plan.cut, *plan.grouping, RELU=relu, **plan.tile
    )
    if weights:
        return dx, sums_normal.sum(dim=(0, 1)), sums.sum(dim=(0, 1))
    return dx, mean.new_empty(0), mean.new_empty(0)
