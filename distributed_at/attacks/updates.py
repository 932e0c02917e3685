"""Update rules of an attack that keep something from one step to the next. The ball's own step keeps nothing: ``balls.py``.

The gradient that such a rule is given may come from a compiled or captured iteration; the rule itself runs beside it, and
never waits for the device.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from distributed_at.attacks.balls import Ball, Bounds

_LARGEST = 1e18  # whose square float32 holds


class UpdateRule(Protocol):
    """How gradients move images, with a state that begins anew at every restart."""

    def begin(self, adv: torch.Tensor) -> Any:
        """Return the state before the first step from ``adv`` (N, C, H, W)."""

    def step(
        self, adv: torch.Tensor, grad: torch.Tensor, state: Any, *, step_size: float, bounds: Bounds, ball: Ball
    ) -> tuple[torch.Tensor, Any]:
        """Return the next images, inside the bounds, and the next state.

        Args:
            adv, grad: (N, C, H, W); the gradient of the summed loss, which is to rise.
            state: what the step before returned.
            step_size: in [0, 1] units, after the attack's schedule.
            bounds, ball: the feasible set, and what projects into it.
        """


class Adam:
    """Ascent by Adam on the pixels, projected after each step.

    Gowal et al., "Uncovering the limits of AT", 2020: the inner optimiser of their code, betas 0.9 and 0.999, epsilon
    1e-9; in training a step of 0.1 for 5 steps, then 0.01. A NaN gradient element counts as 0.
    """

    betas = (0.9, 0.999)
    epsilon = 1e-9

    def begin(self, adv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        return torch.zeros_like(adv), torch.zeros_like(adv), 0

    def step(
        self,
        adv: torch.Tensor,
        grad: torch.Tensor,
        state: tuple[torch.Tensor, torch.Tensor, int],
        *,
        step_size: float,
        bounds: Bounds,
        ball: Ball,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor, int]]:
        mean, square, count = state
        grad = torch.nan_to_num(grad.to(adv.dtype), 0.0, _LARGEST, -_LARGEST)
        mean = torch.lerp(mean, grad, 1 - self.betas[0])
        square = torch.lerp(square, grad.square(), 1 - self.betas[1])
        count += 1
        unbiased = mean / (1 - self.betas[0] ** count)
        spread = (square / (1 - self.betas[1] ** count)).sqrt() + self.epsilon
        return ball.project(adv + step_size * unbiased / spread, bounds), (mean, square, count)


ADAM = Adam()
