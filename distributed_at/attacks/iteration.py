"""One attack iteration as a pure function: input gradient, then projected step. It can be compiled or captured.

It touches no ``.grad``: only ``torch.autograd.grad`` (or ``torch.func.grad``) with respect to the image. An attack
with ``.backward()`` would add wasted weight gradients, and under data parallelism reduce them over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from distributed_at.attacks.balls import Bounds
from distributed_at.attacks.losses import AttackLoss, Goal
from distributed_at.attacks.threat import Threat
from distributed_at.logits import checked_logits

Model = Callable[[torch.Tensor], torch.Tensor]
# (adv, step_size, bounds, goal) -> (next adv, logits at adv)
Iteration = Callable[[torch.Tensor, torch.Tensor, Bounds, Goal], tuple[torch.Tensor, torch.Tensor]]


def input_gradient(
    model: Model, loss: AttackLoss, adv: torch.Tensor, goal: Goal, *, loss_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the *summed* loss with respect to images (N, C, H, W), and the logits there (N, K).

    Summed, so that an image's gradient does not depend on how many others share its batch, and does not underflow.
    """
    with torch.enable_grad():
        image = adv.detach().requires_grad_()
        logits = checked_logits(model(image), image)
        total = loss(at_least_float32(logits), goal).sum() * loss_scale
        (grad,) = torch.autograd.grad(total, image)
    return grad, logits.detach()


def functional_input_gradient(
    model: Model, loss: AttackLoss, adv: torch.Tensor, goal: Goal, *, loss_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same through ``torch.func.grad``, which torch.compile traces into one graph; for models without side effects."""

    def total(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(image)
        return loss(at_least_float32(logits), goal).sum() * loss_scale, logits

    grad, logits = torch.func.grad(total, has_aux=True)(adv)
    return grad, logits


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32 where an autocast model gave 16 bits: the losses' exponentials need the range."""
    return logits if logits.dtype == torch.float64 else logits.to(torch.float32)


def make_iteration(
    model: Model,
    threat: Threat,
    loss: AttackLoss,
    *,
    loss_scale: float = 1.0,
    functional: bool = False,
    fused: bool = False,
) -> Iteration:
    """Return the pure function (adv, step_size, bounds, goal) -> (next adv, logits at adv)."""
    gradient = functional_input_gradient if functional else input_gradient

    def iterate(
        adv: torch.Tensor, step_size: torch.Tensor, bounds: Bounds, goal: Goal
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad, logits = gradient(model, loss, adv, goal, loss_scale=loss_scale)
        return threat.step_into(adv, grad, step_size, bounds, fused=fused), logits

    return iterate
