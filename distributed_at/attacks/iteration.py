"""One attack iteration as a pure function: input gradient, then projected step. It can be compiled or captured.

It touches no ``.grad``: only ``torch.autograd.grad`` (or ``torch.func.grad``) with respect to the image. An attack
with ``.backward()`` would add wasted weight gradients, and under data parallelism reduce them over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from distributed_at.attacks.balls import Bounds
from distributed_at.attacks.losses import Goal, LossFunction
from distributed_at.attacks.threat import Step
from distributed_at.logits import checked_logits

Model = Callable[[torch.Tensor], torch.Tensor]
# (adv, step_size, bounds, goal) -> (next adv, logits at adv); of an update rule with a state: (gradient, logits at adv)
Iteration = Callable[[torch.Tensor, torch.Tensor, Bounds, Goal], tuple[torch.Tensor, torch.Tensor]]


class Gradient(Protocol):
    """What finds the direction in which the loss rises."""

    def __call__(
        self, model: Model, loss: LossFunction, adv: torch.Tensor, goal: Goal, *, loss_scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gradient (N, C, H, W) of the summed loss times ``loss_scale``, and the logits at ``adv`` (N, K)."""


def input_gradient(
    model: Model, loss: LossFunction, adv: torch.Tensor, goal: Goal, *, loss_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of the *summed* loss with respect to images (N, C, H, W), and the logits there (N, K).

    Summed, so that an image's gradient does not depend on how many others share its batch, and does not underflow.
    """
    with torch.enable_grad():
        image = adv.detach().requires_grad_()
        logits = checked_logits(model(image), image)
        total = loss(at_least_float32(logits), _looking_again(model, goal)).sum() * loss_scale
        (grad,) = torch.autograd.grad(total, image)
    return grad, logits.detach()


def functional_input_gradient(
    model: Model, loss: LossFunction, adv: torch.Tensor, goal: Goal, *, loss_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same through ``torch.func.grad``, which torch.compile traces into one graph; for models without side effects."""

    def total(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(image)
        return loss(at_least_float32(logits), _looking_again(model, goal)).sum() * loss_scale, logits

    grad, logits = torch.func.grad(total, has_aux=True)(adv)
    return grad, logits


def _looking_again(model: Model, goal: Goal) -> Goal:
    """Return the goal with the prediction on the clean images, where each step looks at them anew.

    After the forward of the adversarial images, as TRADES' code evaluates the arguments of its loss: in train mode the
    running statistics remember the order.
    """
    if goal.clean is None:
        return goal
    return goal._replace(reference=torch.log_softmax(clean_logits(model, goal.clean), dim=1))


def clean_logits(model: Model, x: torch.Tensor) -> torch.Tensor:
    """Return the (N, K) logits of clean images in float32 or wider, without a graph."""
    with torch.no_grad():
        return at_least_float32(checked_logits(model(x), x))


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32 where an autocast model gave 16 bits: the losses' exponentials need the range."""
    return logits if logits.dtype == torch.float64 else logits.to(torch.float32)


def make_iteration(
    model: Model,
    loss: LossFunction,
    step: Step | None,
    *,
    gradient: Gradient = input_gradient,
    loss_scale: float = 1.0,
) -> Iteration:
    """Return the pure function (adv, step_size, bounds, goal) -> (next adv, logits at adv).

    Without a ``step``, which is what an update rule with a state asks for, it returns the gradient in place of next adv.
    """

    def iterate(
        adv: torch.Tensor, step_size: torch.Tensor, bounds: Bounds, goal: Goal
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad, logits = gradient(model, loss, adv, goal, loss_scale=loss_scale)
        return (grad if step is None else step(adv, grad, step_size, bounds)), logits

    return iterate
