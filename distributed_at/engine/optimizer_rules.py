"""Update rules of published codes that torch does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


class CentralisedSGD(torch.optim.SGD):
    """SGD with momentum on centralised gradients (Yong et al., "Gradient centralization", 2020, eq. 1).

    From the gradient with its weight decay in it, the mean over all dimensions but the first (that of the output filters) is
    subtracted, for every tensor of ``least_dims`` dimensions and more; then comes momentum. That the decay is centralised
    too is the form of Pang et al.'s code ("Bag of tricks", SGD-GC: 2 dimensions, SGD-GCC: 4); later upstream
    versions leave it out. Each parameter must be whole: not under ZeRO 1 and 2, which step on slices.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float, least_dims: int) -> None:
        super().__init__(groups, lr=lr, momentum=momentum)
        self.least_dims = least_dims

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None, "there is no closure in a training step"
        for group, parameter, gradient in _decayed_gradients(self):
            if gradient.dim() >= self.least_dims:
                gradient -= gradient.mean(dim=tuple(range(1, gradient.dim())), keepdim=True)
            if group["momentum"]:
                gradient = _kept(self, parameter, "momentum_buffer").mul_(group["momentum"]).add_(gradient)
            parameter.add_(gradient, alpha=-group["lr"])


class TensorFlowRMSprop(torch.optim.Optimizer):
    """RMSProp as TensorFlow has it, which published ImageNet rates were tuned for (Kannan et al.'s code).

    v <- a v + (1 - a) g^2 from v = 1; m <- mu m + lr g / sqrt(v + eps); w <- w - m. Against torch's: eps stands inside the
    root, v begins at 1, and the rate is inside the momentum, so that a lower rate works at once only on new gradients.
    v - 1 is what is kept, so that everything begins at zero and the first step needs no case of its own.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, decay: float, momentum: float, eps: float) -> None:
        super().__init__(groups, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        assert closure is None, "there is no closure in a training step"
        for group, parameter, gradient in _decayed_gradients(self):
            square = _kept(self, parameter, "square_less_one")
            square.lerp_(gradient.square() - 1.0, 1.0 - group["decay"])
            update = gradient * (square + (1.0 + group["eps"])).rsqrt()
            moved = _kept(self, parameter, "momentum_buffer").mul_(group["momentum"]).add_(update, alpha=group["lr"])
            parameter.sub_(moved)


def _decayed_gradients(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
    """Yield (group, parameter, gradient with its weight decay, of its own memory) where there is a gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group, parameter, parameter.grad.add(parameter, alpha=group["weight_decay"])


def _kept(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, key: str) -> torch.Tensor:
    """Return a tensor of a parameter's state, which begins at zero."""
    state = optimizer.state[parameter]
    if state.get(key) is None:
        state[key] = torch.zeros_like(parameter)
    kept: torch.Tensor = state[key]
    return kept
