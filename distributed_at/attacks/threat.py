"""A threat model: which norm, how far, inside which pixel box, and where attacks start.

Usable alone; what is done inside the set (gradients, iterations, restarts) is ``pgd.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from distributed_at import ops
from distributed_at.attacks import balls
from distributed_at.attacks.balls import Ball, Bounds
from distributed_at.attacks.counters import Counters
from distributed_at.catalogue.attacks import ATTACK_STARTS, BALLS, Start
from distributed_at.errors import ConfigError

# (adv, grad, 0-dim step size, bounds) -> next adv
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Bounds], torch.Tensor]


@dataclass(frozen=True)
class Threat:
    """A ball around the clean image, cut with the pixel box.

    Attributes:
        norm: "linf", "l2", or what a plug-in adds to ``BALLS``.
        eps: radius in [0, 1] pixel units (8 grey levels are ``8 / 255``).
        box: smallest and largest pixel.
    """

    norm: str
    eps: float
    box: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        facts = BALLS[self.norm]
        if not self.eps >= 0:
            raise ConfigError(f"eps must be at least 0, got {self.eps}")
        low, high = self.box
        if not low < high:
            raise ConfigError(f"box must be (low, high) with low < high, got {self.box}")
        if facts.per_pixel and self.eps > high - low:
            raise ConfigError(
                f"eps {self.eps:g} is wider than the pixel box {self.box}; eps is in the units of the box: "
                f"{self.eps:g} grey levels are {self.eps:g} / 255"
            )

    @property
    def ball(self) -> Ball:
        """The geometry of ``norm``."""
        return BALLS[self.norm].load()

    def bounds(self, x: torch.Tensor, *, eps: float | torch.Tensor | None = None, box: bool = True) -> Bounds:
        """Return the feasible set around images (N, C, H, W), computed once per attack; ``box=False`` leaves the ball."""
        low, high = self.box if box else (float("-inf"), float("inf"))
        return self.ball.bounds(x, balls.radius(self.eps if eps is None else eps, x), low, high)

    def project_into(self, adv: torch.Tensor, bounds: Bounds) -> torch.Tensor:
        """Return ``adv`` (N, C, H, W) projected into bounds that ``bounds`` gave."""
        return self.ball.project(adv, bounds)

    def stepper(self, *, fused: bool = False) -> Step:
        """Return the function (adv, grad, step_size, bounds) -> one ascent step, projected (sign for linf, unit length for l2).

        ``fused`` takes the kernel where there is one (float32): fewer passes, and the same bits for linf; for l2 the
        same to 2^-22, as the kernel sums norms in another order.
        """
        ball, box = self.ball, self.box

        def step(adv: torch.Tensor, grad: torch.Tensor, step_size: torch.Tensor, bounds: Bounds) -> torch.Tensor:
            if fused and adv.dtype == torch.float32 and ball.step_kernel is not None:
                return ball.step_kernel(
                    adv, bounds.center, grad, eps=bounds.eps, step=step_size, direction=-1.0, box=box
                )
            return ball.step(adv, grad, step_size, bounds)

        return step

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
        return self.stepper()(adv, grad, size, self.bounds(x, eps=eps))

    def random_start(
        self,
        x: torch.Tensor,
        *,
        seed: int,
        epoch: int,
        sample_ids: torch.Tensor,
        draw: int = 0,
        kind: str | Start = "uniform",
        std: float = 0.001,
        clean_probability: float = 0.0,
        coin_ids: torch.Tensor | None = None,
        clip: bool = True,
        eps: float | torch.Tensor | None = None,
        fused: bool = False,
    ) -> torch.Tensor:
        """Return where an attack starts, (N, C, H, W), a function of counters and the clean images alone.

        Args:
            x: clean images in the box.
            seed, epoch, sample_ids: counters, sample_ids (N,) int64.
            draw: number of the restart.
            kind: an entry of ``ATTACK_STARTS`` or its name; ``starts.py`` and ``balls.py`` state the laws.
            std: of "gaussian", in pixel units of the box [0, 1].
            clean_probability: probability of starting at the clean image instead (Xie & Yuille's code: 0.2).
            coin_ids: (N,) int64 that the clean-start coin is keyed with; None = sample_ids. BN group numbers here make
                one coin a group, as in that code.
            clip: clip to the box. Xie & Yuille's and TRADES' codes do not; the ball holds in any case.
            fused: draw, add and project in one pass where the ball has a kernel (float32): the same bits.
        """
        entry, ball = (ATTACK_STARTS[kind] if isinstance(kind, str) else kind), self.ball
        kernel = ball.start_kernels.get(kind) if fused and isinstance(kind, str) and x.dtype == torch.float32 else None
        size = balls.radius(self.eps if eps is None else eps, x)
        coins = sample_ids if coin_ids is None else coin_ids
        if kernel is not None:
            return kernel(
                x, sample_ids, eps=size, seed=seed, epoch=epoch, draw=draw, clean_probability=clean_probability,
                coin_ids=coins, clip=clip, box=self.box,
            )  # fmt: skip
        counters = Counters(seed=seed, epoch=epoch, sample_ids=sample_ids, draw=draw)
        point = entry.load()(x, ball, size, counters, std)
        start = ball.project(point, self.bounds(x, eps=eps, box=clip))
        if clean_probability > 0 and not entry.clean:
            stays = ops.reference.stays_clean(coins, clean_probability, seed=seed, epoch=epoch, draw=draw)
            start = torch.where(stays.view(-1, *([1] * (x.dim() - 1))), x, start)
        return start
