"""The attack iteration in its forms, from a training loop's ``.backward()`` to a captured graph, on one network.

Builds and checks; ``common.py`` times. Each form is an ``Iteration`` for ``PGD.perturb(..., iteration=...)``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from distributed_at.attacks import PGD, Threat
from distributed_at.attacks.balls import Bounds
from distributed_at.attacks.iteration import Iteration
from distributed_at.attacks.losses import Goal
from distributed_at.config import ModelConfig
from distributed_at.engine.twin.compiled_attack import StaticIteration
from distributed_at.engine.twin.twin import DTYPES, Twin
from distributed_at.models import build_model

EPS, STEP = 8 / 255, 2 / 255
LOSS_TOLERANCE = 0.005
RUNGS = ("backward", "grad", "twin", "folded", "compiled", "graphed")
DESCRIPTIONS = {
    "backward": "live network, .backward(): weight gradients computed and thrown away",
    "grad": "live network channels-last, autograd.grad; 16 bits by autocast",
    "twin": "weights cast once, batch norm as it is",
    "folded": "and batch norm inside the convolutions",
    "compiled": "and torch.compile of the whole iteration",
    "graphed": "and one CUDA graph of it",
}


def network(arch: str, *, norm: str = "bn", size: int = 32, device: str = "cpu", width: int = 64) -> nn.Module:
    """Return a random network in eval mode whose batch-norm statistics come from a few batches of noise images."""
    stem = "cifar" if size <= 64 else "imagenet"
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"arch": arch, "norm": norm, "stem": stem, "base_width": width})
    model = build_model(config, num_classes=10 if stem == "cifar" else 1000).to(device).train()
    with torch.no_grad():
        for _ in range(8):
            model(torch.rand(8, 3, size, size, device=device))
    return model.eval()


def batch(model: nn.Module, count: int, size: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (count, 3, size, size) channels-last, and the network's own predictions as labels."""
    x = torch.rand((count, 3, size, size), generator=torch.Generator().manual_seed(1)).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return x, torch.cat([model(part).argmax(dim=1) for part in x.split(64)])


def attack(num_steps: int, *, dtype: str = "fp32") -> PGD:
    """Return untargeted Linf PGD from the clean image."""
    return PGD(
        threat=Threat("linf", EPS), num_steps=num_steps, step_size=STEP, start="zero", check_input=False,
        loss_scale=128.0 if dtype == "fp16" else 1.0, fused=True,
    )  # fmt: skip


def autocast(model: Callable, device: str, dtype: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the model with 16-bit autocast around its forward, as most codes do it; fp32: the model."""
    if DTYPES[dtype] is None:
        return model

    def call(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, dtype=DTYPES[dtype]):
            return model(x)

    return call


def backward_iteration(model: Callable, parameters: list[nn.Parameter]) -> Iteration:
    """Return the iteration of most public training loops: ``loss.backward()`` and the sign of ``x.grad``."""

    def iterate(adv: torch.Tensor, step_size: torch.Tensor, bounds: Bounds, goal: Goal):
        with torch.enable_grad():
            image = adv.detach().requires_grad_()
            logits = model(image)
            F.cross_entropy(logits.float(), goal.labels, reduction="sum").backward()
        assert image.grad is not None
        following = torch.clamp(adv + step_size * image.grad.sign(), min=bounds.lower, max=bounds.upper)
        for parameter in parameters:
            parameter.grad = None
        return following, logits.detach()

    return iterate


@dataclass(frozen=True)
class Setting:
    """One network, batch and precision.

    Attributes:
        model: live network, float32, eval mode; its parameters require gradients, as in training.
        x, y: images and labels.
        dtype: 'fp32', 'bf16' or 'fp16'.
        device: 'cpu' or 'cuda'.
    """

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    dtype: str
    device: str

    def iteration(self, rung: str) -> Iteration:
        """Return one form of the iteration.

        Raises:
            KeyError: it is none of ``RUNGS``.
        """
        pgd = attack(1, dtype=self.dtype)
        if rung in ("backward", "grad"):
            live = copy.deepcopy(self.model).to(memory_format=torch.channels_last)
            called = autocast(live, self.device, self.dtype)
            return backward_iteration(called, list(live.parameters())) if rung == "backward" else pgd.iteration(called)
        if rung in ("twin", "folded"):
            return pgd.iteration(Twin(self.model, bn_mode="eval", dtype=self.dtype, fold=rung == "folded"))
        graph = {"compiled": False, "graphed": True}[rung]
        twin = Twin(self.model, bn_mode="eval", dtype=self.dtype)
        return StaticIteration(pgd, twin, batch_size=len(self.x), use_compiler=True, use_graph=graph)

    def convolutions_alone(self, num_steps: int) -> Callable[[], object]:
        """Return what runs the folded network's convolutions and their input gradients, and nothing between them.

        No attack that computes the same convolutions is faster than this on the same library.
        """
        module = Twin(self.model, bn_mode="eval", dtype=self.dtype).module
        calls: list[tuple[nn.Conv2d, torch.Tensor, torch.Tensor]] = []

        def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            assert isinstance(layer, nn.Conv2d)
            calls.append((layer, inputs[0].detach(), torch.ones_like(output)))

        hooks = [m.register_forward_hook(note) for m in module.modules() if isinstance(m, nn.Conv2d)]
        with torch.no_grad():
            module(self.x)
        for hook in hooks:
            hook.remove()

        @torch.no_grad()
        def run() -> None:
            for _ in range(num_steps):
                for conv, image, _ in calls:
                    F.conv2d(image, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
                for conv, image, gradient in reversed(calls):
                    torch.ops.aten.convolution_backward(
                        gradient, image, conv.weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0],
                        conv.groups, [True, False, False],
                    )  # fmt: skip

        return run

    def perturb(self, iteration: Iteration, num_steps: int) -> torch.Tensor:
        """Return adversarial images of ``num_steps`` iterations."""
        return attack(num_steps, dtype=self.dtype).perturb(self.model, self.x, self.y, iteration=iteration)

    def loss(self, adv: torch.Tensor) -> float:
        """Return the mean cross-entropy of ``adv`` by the live float32 network."""
        with torch.no_grad():
            pieces = zip(adv.split(64), self.y.split(64), strict=True)
            return sum(F.cross_entropy(self.model(a), y, reduction="sum").item() for a, y in pieces) / len(adv)


def check(setting: Setting, adv: torch.Tensor, expected_loss: float, *, slack: float = 0.0) -> str:
    """Return '' where ``adv`` is a result equal to the reference's, else what is wrong with it.

    Args:
        setting: network and clean images.
        adv: what an attack returned.
        expected_loss: what the reference attack reached.
        slack: how far outside ball and box a peer's float arithmetic may leave it; ours must not: 0.
    """
    reach = (adv.double() - setting.x.double()).abs().max().item()
    if reach > EPS + slack:
        return f"outside the ball by {reach - EPS:.2e}"
    if adv.min().item() < -slack or adv.max().item() > 1 + slack:
        return "outside the box"
    found = setting.loss(adv)
    if abs(found - expected_loss) > LOSS_TOLERANCE * abs(expected_loss):
        return f"reached loss {found:.4f}, the reference {expected_loss:.4f}"
    return ""
