"""The arithmetic of the Linf and L2 balls inside the pixel box: bounds, projections and steps, as pure functions.

Both constraints hold *exactly* in the dtype of the images, not up to rounding. No function here looks at a value on
the host, so all may be compiled or captured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from distributed_at.ops import reference


class Bounds(NamedTuple):
    """The feasible set around one batch.

    Attributes:
        lower, upper: linf: (N, C, H, W), ball and box in one interval; l2: 0-dim, the box alone.
        center: (N, C, H, W), the clean images.
        eps: 0-dim radius in the dtype of the images.
    """

    lower: torch.Tensor
    upper: torch.Tensor
    center: torch.Tensor
    eps: torch.Tensor


def radius(eps: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return ``eps`` as a 0-dim tensor of the dtype of ``like``, rounded towards zero, without host synchronisation.

    Rounding down keeps |adv - x| <= eps true against the float64 number that the user wrote.
    """
    if isinstance(eps, torch.Tensor):
        wide = eps.to(device=like.device, dtype=torch.float64).reshape(())
    else:
        wide = torch.full((), float(eps), dtype=torch.float64, device=like.device)
    near = wide.to(like.dtype)
    return torch.where(near.to(torch.float64) > wide, torch.nextafter(near, torch.zeros_like(near)), near)


def _rounding_error(a: torch.Tensor, b: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return (a + b) - total exactly, where ``total`` is the rounded a + b (Knuth's two-sum)."""
    b_part = total - a
    return (a - (total - b_part)) + (b - b_part)


def linf_bounds(x: torch.Tensor, eps: torch.Tensor, low: float, high: float) -> Bounds:
    """Return the tightest interval of representable numbers inside both [x - eps, x + eps] and [low, high].

    x - eps rounds to nearest, which may fall outside the ball by half a unit in the last place; such bounds move one
    number inwards. Where x itself lies outside the box, the box wins.
    """
    down = x - eps
    down = torch.where(_rounding_error(x, -eps, down) > 0, torch.nextafter(down, x), down)
    up = x + eps
    up = torch.where(_rounding_error(x, eps, up) < 0, torch.nextafter(up, x), up)
    return Bounds(down.clamp(low, high), up.clamp(low, high), x, eps)


def linf_project(adv: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """Return the nearest point of the interval (Madry et al. 2018, section 2)."""
    return torch.minimum(torch.maximum(adv, bounds.lower), bounds.upper)


def linf_step(adv: torch.Tensor, grad: torch.Tensor, step_size: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """Return one ascent step of the sign of the gradient, projected. A NaN gradient element moves nothing."""
    sign = (grad > 0).to(adv.dtype) - (grad < 0).to(adv.dtype)  # 0 at NaN by comparison, whatever torch.sign does
    return linf_project(adv + step_size * sign, bounds)


def l2_project(adv: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """Return ``adv`` scaled into the L2 ball around its clean image, then clipped to the box; inside, unchanged."""
    return reference.l2_project(adv, bounds.center, bounds.eps, bounds.lower, bounds.upper)


def l2_direction(grad: torch.Tensor) -> torch.Tensor:
    """Return the unit vector of each image's gradient; NaN elements count as 0 and a zero gradient stays zero."""
    finite = reference.finite_gradient(grad)
    norms = reference.l2_norms(finite)
    return (finite / torch.where(norms > 0, norms, 1.0)).to(grad.dtype)


def l2_step(adv: torch.Tensor, grad: torch.Tensor, step_size: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """Return one ascent step of length ``step_size`` along the gradient, projected (``ops.l2_step`` states it)."""
    return reference.l2_step(adv, bounds.center, grad, bounds.eps, step_size, -1.0, bounds.lower, bounds.upper)
