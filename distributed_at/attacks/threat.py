"""A threat model: which norm, how far, inside which pixel box, and where attacks start.

Usable alone; what is done inside the set (gradients, iterations, restarts) is ``pgd.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from distributed_at import ops, rng
from distributed_at.attacks import balls
from distributed_at.attacks.balls import Bounds
from distributed_at.errors import ConfigError, did_you_mean

Norm = Literal["linf", "l2"]
StartKind = Literal["uniform", "zero", "gaussian"]
NORMS = ("linf", "l2")
STARTS = ("uniform", "zero", "gaussian")


def check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ConfigError that names the field, the value, what is allowed and the nearest spelling."""
    if value not in allowed:
        raise ConfigError(f"{field} is {value!r}; allowed are {', '.join(allowed)}.{did_you_mean(value, allowed)}")


@dataclass(frozen=True)
class Threat:
    """A ball around the clean image, cut with the pixel box.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in [0, 1] pixel units (8 grey levels are ``8 / 255``).
        box: smallest and largest pixel.
    """

    norm: Norm
    eps: float
    box: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, NORMS)
        if not self.eps >= 0:
            raise ConfigError(f"eps must be at least 0, got {self.eps}")
        low, high = self.box
        if not low < high:
            raise ConfigError(f"box must be (low, high) with low < high, got {self.box}")
        if self.norm == "linf" and self.eps > high - low:
            raise ConfigError(
                f"eps {self.eps:g} is wider than the pixel box {self.box}; eps is in the units of the box: "
                f"{self.eps:g} grey levels are {self.eps:g} / 255"
            )

    def bounds(self, x: torch.Tensor, *, eps: float | torch.Tensor | None = None, box: bool = True) -> Bounds:
        """Return the feasible set around images (N, C, H, W), computed once per attack; ``box=False`` leaves the ball."""
        low, high = self.box if box else (float("-inf"), float("inf"))
        size = balls.radius(self.eps if eps is None else eps, x)
        if self.norm == "linf":
            return balls.linf_bounds(x, size, low, high)
        return Bounds(torch.full_like(size, low), torch.full_like(size, high), x, size)

    def project_into(self, adv: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Return ``adv`` (N, C, H, W) projected into bounds that ``bounds`` gave."""
        return balls.linf_project(adv, bounds) if self.norm == "linf" else balls.l2_project(adv, bounds)

    def step_into(
        self, adv: torch.Tensor, grad: torch.Tensor, step_size: torch.Tensor, bounds: Bounds, *, fused: bool = False
    ) -> torch.Tensor:
        """Return one ascent step (sign for linf, unit L2 length for l2), projected into bounds.

        ``fused`` takes the kernel where there is one (float32): fewer passes, and the same bits for linf; for l2 the
        same to 2^-22, as the kernel sums norms in another order.
        """
        if fused and adv.dtype == torch.float32:
            kernel = ops.linf_step if self.norm == "linf" else ops.l2_step
            return kernel(adv, bounds.center, grad, eps=bounds.eps, step=step_size, direction=-1.0, box=self.box)
        if self.norm == "linf":
            return balls.linf_step(adv, grad, step_size, bounds)
        return balls.l2_step(adv, grad, step_size, bounds)

    def project(self, adv: torch.Tensor, x: torch.Tensor, *, eps: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return the point of ball and box that stands for ``adv``: inside exactly, idempotent, identity inside."""
        return self.project_into(adv, self.bounds(x, eps=eps))

    def step(
        self,
        adv: torch.Tensor,
        grad: torch.Tensor,
        x: torch.Tensor,
        step_size: float | torch.Tensor,
        *,
        eps: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return one projected ascent step from ``adv`` along ``grad`` around clean images ``x``, all (N, C, H, W)."""
        size = torch.as_tensor(step_size, dtype=adv.dtype, device=adv.device)
        return self.step_into(adv, grad, size, self.bounds(x, eps=eps))

    def random_start(
        self,
        x: torch.Tensor,
        *,
        seed: int,
        epoch: int,
        sample_ids: torch.Tensor,
        draw: int = 0,
        kind: StartKind = "uniform",
        std: float = 0.001,
        clean_probability: float = 0.0,
        coin_ids: torch.Tensor | None = None,
        clip: bool = True,
        eps: float | torch.Tensor | None = None,
        fused: bool = False,
    ) -> torch.Tensor:
        """Return where an attack starts, (N, C, H, W), a function of counters and the clean images alone.

        The noise of element i of an image is word i of its sample's counter stream, i counting in (C, H, W) order
        whatever the memory format. The laws:

        - "uniform", linf: uniform in [-eps, eps) per element (Madry et al. 2018).
        - "uniform", l2: a Gaussian direction of length eps * r, r uniform in [0, 1) (Pang et al.'s code). This is the law of
          Pang et al.'s code; it is not the uniform law in the ball, whose radius would be eps * r^(1/d).
        - "gaussian": std * N(0, 1) per element (TRADES code), std in pixel units of the box [0, 1].
        - "zero": the clean image.

        Args:
            x: clean images in the box.
            seed, epoch, sample_ids: counters, sample_ids (N,) int64.
            draw: number of the restart.
            clean_probability: probability of starting at the clean image instead (Xie & Yuille's code: 0.2).
            coin_ids: (N,) int64 that the clean-start coin is keyed with; None = sample_ids. BN group numbers here make
                one coin a group, as in that code.
            clip: clip to the box. Xie & Yuille's and TRADES' codes do not; the ball holds in any case.
            fused: draw and add in one pass where there is a kernel (uniform, linf, float32): the same bits.
        """
        check_choice("start", kind, STARTS)
        if fused and kind == "uniform" and self.norm == "linf" and x.dtype == torch.float32:
            return ops.random_start(
                x,
                sample_ids,
                eps=balls.radius(self.eps if eps is None else eps, x),
                seed=seed,
                epoch=epoch,
                draw=draw,
                clean_probability=clean_probability,
                coin_ids=coin_ids,
                clip=clip,
                box=self.box,
            )
        bounds = self.bounds(x, eps=eps, box=clip)
        if kind == "zero":
            return self.project_into(x, bounds)
        n, count = x.shape[0], x[0].numel() if x.shape[0] else 0
        if kind == "gaussian":
            noise = std * rng.normal(seed, rng.Purpose.START, epoch, sample_ids, count, draw=draw).to(x.dtype)
        elif self.norm == "linf":
            unit = rng.uniform(seed, rng.Purpose.START, epoch, sample_ids, count, draw=draw).to(x.dtype)
            noise = (2.0 * unit - 1.0) * bounds.eps
        else:
            normals = rng.normal(seed, rng.Purpose.START, epoch, sample_ids, count, draw=draw).to(x.dtype)
            share = rng.uniform(seed, rng.Purpose.START_RADIUS, epoch, sample_ids, 1, draw=draw).to(x.dtype)
            noise = balls.l2_direction(normals) * share * bounds.eps
        start = self.project_into(x + noise.reshape(x.shape), bounds)
        if clean_probability > 0:
            ids = sample_ids if coin_ids is None else coin_ids
            coin = rng.uniform(seed, rng.Purpose.CLEAN_START, epoch, ids, 1, draw=draw)  # (N, 1)
            start = torch.where(coin.reshape(n, *([1] * (x.dim() - 1))) < clean_probability, x, start)
        return start
