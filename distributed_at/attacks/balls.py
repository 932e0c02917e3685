"""The geometry of the Linf and L2 balls inside the pixel box: bounds, projections, steps and laws of starts.

Both constraints hold *exactly* in the dtype of the images, not up to rounding. No function here looks at a value on
the host, so all may be compiled or captured. The arithmetic itself is that of ``ops/reference.py``, which the compiled
kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

from distributed_at import ops
from distributed_at.attacks.counters import Counters
from distributed_at.ops import reference
from distributed_at.rng import Purpose


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


class Ball(Protocol):
    """What an attack asks a norm. Images are (N, C, H, W); lengths are in the units of the pixels.

    Attributes:
        step_kernel: a step in one pass, called as ``ops.linf_step``; None = there is none.
        start_kernels: name of a start -> its law, projection and clean-start coin in one pass, as ``ops.random_start``.
    """

    step_kernel: Callable[..., torch.Tensor] | None
    start_kernels: Mapping[str, Callable[..., torch.Tensor]]

    def bounds(self, x: torch.Tensor, eps: torch.Tensor, low: float, high: float) -> Bounds:
        """Return the feasible set around images, computed once per attack; ``eps`` is 0-dim."""

    def project(self, adv: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Return the point of ball and box that stands for ``adv``: inside exactly, idempotent, identity inside."""

    def step(self, adv: torch.Tensor, grad: torch.Tensor, step_size: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Return one step of steepest ascent, projected. A NaN gradient element moves nothing."""

    def noise(self, x: torch.Tensor, eps: torch.Tensor, counters: Counters) -> torch.Tensor:
        """Return what a "uniform" start adds to images."""

    def size(self, delta: torch.Tensor) -> torch.Tensor:
        """Return the (N,) lengths of differences (N, ...)."""

    def rounding(self, pixels: int) -> float:
        """Return by how much float32 images of so many numbers may seem to leave the ball."""


_ROUNDING = 6e-8  # of one float32 near 1


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


class Linf:
    """Every element within eps of its own."""

    step_kernel = staticmethod(ops.linf_step)
    start_kernels: Mapping[str, Callable[..., torch.Tensor]] = {"uniform": ops.random_start}

    def bounds(self, x: torch.Tensor, eps: torch.Tensor, low: float, high: float) -> Bounds:
        """Return the tightest interval of representable numbers inside both [x - eps, x + eps] and [low, high].

        Where x itself lies outside the box, the box wins.
        """
        return Bounds(*reference.linf_interval(x, eps, (low, high)), x, eps)

    def project(self, adv: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Return the nearest point of the interval (Madry et al. 2018, section 2)."""
        return torch.minimum(torch.maximum(adv, bounds.lower), bounds.upper)

    def step(self, adv: torch.Tensor, grad: torch.Tensor, step_size: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Return one ascent step of the sign of the gradient, projected."""
        return self.project(adv + step_size * reference.sign(grad, adv.dtype), bounds)

    def noise(self, x: torch.Tensor, eps: torch.Tensor, counters: Counters) -> torch.Tensor:
        """Return noise uniform in [-eps, eps) per element (Madry et al. 2018)."""
        unit = counters.uniform(x[0].numel() if len(x) else 0).to(x.dtype)
        return reference.uniform_noise(unit, eps).reshape(x.shape)

    def size(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.flatten(1).abs().amax(1)

    def rounding(self, pixels: int) -> float:
        return _ROUNDING


class L2:
    """An image's whole difference within eps."""

    step_kernel = staticmethod(ops.l2_step)
    start_kernels: Mapping[str, Callable[..., torch.Tensor]] = {}

    def bounds(self, x: torch.Tensor, eps: torch.Tensor, low: float, high: float) -> Bounds:
        return Bounds(torch.full_like(eps, low), torch.full_like(eps, high), x, eps)

    def project(self, adv: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Return ``adv`` scaled into the L2 ball around its clean image, then clipped to the box; inside, unchanged."""
        return reference.l2_project(adv, bounds.center, bounds.eps, bounds.lower, bounds.upper)

    def step(self, adv: torch.Tensor, grad: torch.Tensor, step_size: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Return one ascent step of length ``step_size`` along the gradient, projected (``ops.l2_step`` states it)."""
        return reference.l2_step(adv, bounds.center, grad, bounds.eps, step_size, -1.0, bounds.lower, bounds.upper)

    def noise(self, x: torch.Tensor, eps: torch.Tensor, counters: Counters) -> torch.Tensor:
        """Return a Gaussian direction of length eps * r, r uniform in [0, 1).

        This is the law of Pang et al.'s code; it is not the uniform law in the ball, whose radius would be
        eps * r^(1/d).
        """
        normals = counters.normal(x[0].numel() if len(x) else 0).to(x.dtype)
        share = counters.uniform(1, purpose=Purpose.START_RADIUS).to(x.dtype)
        return (l2_direction(normals) * share * eps).reshape(x.shape)

    def size(self, delta: torch.Tensor) -> torch.Tensor:
        return delta.flatten(1).norm(dim=1)

    def rounding(self, pixels: int) -> float:
        return _ROUNDING * float(pixels**0.5)


def l2_direction(grad: torch.Tensor) -> torch.Tensor:
    """Return the unit vector of each image's gradient; NaN elements count as 0 and a zero gradient stays zero."""
    finite = reference.finite_gradient(grad)
    norms = reference.l2_norms(finite)
    return (finite / torch.where(norms > 0, norms, 1.0)).to(grad.dtype)


LINF, L2_BALL = Linf(), L2()
