"""The meaning of each kernel in plain torch: the specification that the compiled kernels are tested against.

Runs on any device and inside torch.compile; used as it is where no compiler works. Not tuned.
"""

from __future__ import annotations

import math

import torch

from .. import rng


def as_pixels(clean: torch.Tensor) -> torch.Tensor:
    """Return ``clean`` as floats in [0, 1]; bytes are divided by 255, correctly rounded on every device."""
    if clean.dtype != torch.uint8:
        return clean
    # Dividing by a Python number would multiply by a rounded reciprocal on CUDA.
    return clean.to(torch.float32) / torch.full((), 255.0, dtype=torch.float32, device=clean.device)


def sign(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return +1, -1 or 0 in ``dtype``; zero and NaN give 0, infinities give +-1."""
    return (grad > 0).to(dtype) - (grad < 0).to(dtype)


def linf_interval(
    clean: torch.Tensor, eps: torch.Tensor, box: tuple[float, float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (lower, upper), the tightest interval of floats inside both [clean - eps, clean + eps] and the box.

    clean - eps rounds to nearest and may fall outside the ball by half a unit in the last place; such a bound moves one
    float inwards. Where a clean pixel lies outside the box, the box wins.
    """
    lower = clean - eps
    lower = torch.where(_rounding_error(clean, -eps, lower) > 0, torch.nextafter(lower, clean), lower)
    upper = clean + eps
    upper = torch.where(_rounding_error(clean, eps, upper) < 0, torch.nextafter(upper, clean), upper)
    return lower.clamp(*box), upper.clamp(*box)


def _rounding_error(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return (a + b) - total exactly, ``total`` being the rounded a + b (Knuth's two-sum)."""
    b_part = total - a
    return (a - (total - b_part)) + (b - b_part)


def clip_to_ball(x_adv: torch.Tensor, clean: torch.Tensor, eps: torch.Tensor, box: tuple[float, float]) -> torch.Tensor:
    """Return ``x_adv`` clipped to ``linf_interval``, never -0.

    A clean pixel that is not finite gives NaN, so that a broken image is seen.
    """
    lower, upper = linf_interval(clean, eps, box)
    return torch.minimum(torch.maximum(x_adv, lower), upper) + (clean - clean)


def linf_step(
    x_adv: torch.Tensor,
    clean: torch.Tensor,
    grad: torch.Tensor,
    eps: torch.Tensor,
    step: torch.Tensor,
    direction: float,
    box: tuple[float, float],
) -> torch.Tensor:
    """See ``ops.linf_step``; ``eps`` and ``step`` are 0-dim tensors."""
    moved = x_adv - (direction * step) * sign(grad, x_adv.dtype)
    return clip_to_ball(moved, as_pixels(clean), eps, box)


def l2_norms(values: torch.Tensor) -> torch.Tensor:
    """Return the l2 norm of each sample in float64, shaped to broadcast over (N, ...)."""
    flat = values.reshape(values.shape[0], math.prod(values.shape[1:])).double()
    return flat.square().sum(dim=1).sqrt().view(-1, *([1] * (values.dim() - 1)))


def finite_gradient(grad: torch.Tensor) -> torch.Tensor:
    """Return ``grad`` in float64 with NaN as 0 and infinities as the largest float32, so that it has a norm."""
    largest = torch.finfo(torch.float32).max
    return torch.nan_to_num(grad.double(), 0.0, largest, -largest).clamp(-largest, largest)


def l2_project(
    x: torch.Tensor, clean: torch.Tensor, eps: torch.Tensor, low: float | torch.Tensor, high: float | torch.Tensor
) -> torch.Tensor:
    """Return x (N, ...) scaled into the l2 ball around ``clean``, rounded towards it, then clipped to [low, high].

    A sample inside the ball is returned unchanged, and one whose norm is NaN too. Clipping cannot leave the ball, as the
    clean image is in the box.
    """
    delta = x.double() - clean.double()
    norms = l2_norms(delta)
    outside = norms > eps
    # the norm and the product round; this margin keeps the product inside
    margin = max(4.0 * torch.finfo(torch.float32).eps if x.dtype == torch.float32 else 0.0, 1e-12)
    scaled = eps.double() * (1.0 - margin) / torch.where(outside, norms, 1.0) * delta
    near = (clean.double() + scaled).to(x.dtype)
    too_far = (near.double() - clean.double()).abs() > scaled.abs()
    near = torch.where(too_far, torch.nextafter(near, clean.to(x.dtype)), near)
    return torch.clamp(torch.where(outside, near, x), low, high) + 0.0  # type: ignore[arg-type]


def l2_step(
    x_adv: torch.Tensor,
    clean: torch.Tensor,
    grad: torch.Tensor,
    eps: torch.Tensor,
    step: torch.Tensor,
    direction: float,
    low: float | torch.Tensor,
    high: float | torch.Tensor,
) -> torch.Tensor:
    """See ``ops.l2_step``; ``eps`` and ``step`` are 0-dim tensors."""
    finite = finite_gradient(grad)
    norms = l2_norms(finite)
    scale = torch.where(norms > 0, (direction * step.double()) / torch.where(norms > 0, norms, 1.0), 0.0)
    moved = x_adv - (finite * scale).to(x_adv.dtype)
    return l2_project(moved, as_pixels(clean), eps, low, high)


def random_start(
    clean: torch.Tensor,
    sample_ids: torch.Tensor,
    coin_ids: torch.Tensor,
    eps: torch.Tensor,
    *,
    seed: int,
    epoch: int,
    draw: int,
    clean_probability: float,
    clip: bool,
    box: tuple[float, float],
) -> torch.Tensor:
    """See ``ops.random_start``; ``eps`` is a 0-dim tensor."""
    clean = as_pixels(clean)
    count = clean[0].numel() if len(clean) else 0
    unit = rng.uniform(seed, rng.Purpose.START, epoch, sample_ids, count, draw=draw).to(clean.dtype)
    bounds = box if clip else (float("-inf"), float("inf"))
    start = clip_to_ball(clean + uniform_noise(unit.reshape(clean.shape), eps), clean, eps, bounds)
    if clean_probability > 0:
        stays = stays_clean(coin_ids, clean_probability, seed=seed, epoch=epoch, draw=draw)
        start = torch.where(stays.view(-1, *([1] * (clean.dim() - 1))), clean, start)
    return start + 0.0


def uniform_noise(unit: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """Return numbers uniform in [-eps, eps) from ``unit``, uniform in [0, 1)."""
    return eps * (2.0 * unit - 1.0)


def stays_clean(coin_ids: torch.Tensor, probability: float, *, seed: int, epoch: int, draw: int) -> torch.Tensor:
    """Return (N,) bool, the samples whose coin, keyed with ``coin_ids`` (N,) int64, says to start at the clean image."""
    coin = rng.uniform(seed, rng.Purpose.CLEAN_START, epoch, coin_ids, 1, draw=draw)[:, 0]
    return coin < torch.full((), probability, dtype=torch.float32, device=coin.device)
