"""The one place where these tests call the evaluation, and what they ask it about: small networks and images in memory."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from distributed_at.config import AttackConfig, EvaluationEntry, evaluation_entry
from distributed_at.evaluation import EvaluationResult, build_protocol, weights_hash
from tests.evaluation_kit import MemorySource, digits, measure, measure_entry


class Witness(nn.Module):
    """Computes in float64, so that neither batch size nor order of sums matters, and keeps every image that it is asked about."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.double().eval()
        self.forget()

    def forget(self) -> None:
        """Begin anew: no image seen."""
        self.seen: list[torch.Tensor] = []  # (n, C, H, W) each, without gradient: predictions, not steps
        self.asked = {"calls": 0, "images": 0}  # a number of its own would be set back with the module's flags

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked["calls"] += 1
        self.asked["images"] += len(x)
        if not torch.is_grad_enabled():
            self.seen.append(x.detach().clone())
        return self.network(x.double()).float()


class Small(nn.Module):
    """Two convolutions with batch norm and dropout, and no kink that a rounding error could be magnified at."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16 * 16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.softplus(self.norm(self.first(x)))
        return self.head(self.drop(F.softplus(self.second(h)).flatten(1)))


class Untrained(nn.Module):
    """Nothing in common with the other but the shape of its images."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.head = nn.Linear(6 * 16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 12 * self.head(F.avg_pool2d(torch.tanh(3 * self.first(x)), 2).flatten(1))


def _train(network: Small, images: torch.Tensor, labels: torch.Tensor, eps: float = 30 / 255) -> None:
    """Single-step adversarial training, a second of it."""
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(150):
        rows = torch.randperm(len(labels))[:128]
        x = (images[rows].float() / 255).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(x), labels[rows]), x)
        optimiser.zero_grad()
        F.cross_entropy(network((x + eps * gradient.sign()).clamp(0, 1).detach()), labels[rows]).backward()
        optimiser.step()
    optimiser.zero_grad()
    with torch.no_grad():  # sure answers leave losses nothing but rounding errors
        network.head.weight.mul_(0.25)
        network.head.bias.mul_(0.25)


@lru_cache(maxsize=8)
def subject(name: str, *, num_classes: int = 10, size: int = 28) -> tuple[Witness, MemorySource]:
    """Return a network and images of which it gets most right: "trained" adversarially, or "untrained"."""
    images, labels = digits(num_classes)
    images, labels = images[-size:], labels[-size:]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        bare = Small(num_classes) if name == "trained" else Untrained(num_classes)
        if name == "trained":
            _train(bare, *digits(num_classes))
    network = Witness(bare)
    if name == "untrained":  # its own answers are the labels, but for every fourth image
        with torch.no_grad():
            bare.head.bias -= network(images.float() / 255).mean(0) / 12  # so that no class is the answer everywhere
            answers = network(images.float() / 255).argmax(1)
        labels = torch.where(torch.arange(size) % 4 == 3, labels, answers)
    return network, MemorySource(images, labels, num_classes=num_classes, first_id=11)


def arrays(source: MemorySource) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images (N, C, H, W) float32 in [0, 1], labels (N,) and ids (N,)."""
    return (source.images.float() / 255).numpy(), source.all_labels.numpy(), source.sample_ids


def ask(network: nn.Module, source: MemorySource, what: Any, **arguments: Any) -> EvaluationResult:
    """Evaluate one protocol."""
    return measure(network, source, what, **arguments)


def ask_entry(
    network: nn.Module, source: MemorySource, what: EvaluationEntry, **arguments: Any
) -> list[EvaluationResult]:
    """Evaluate an entry of a recipe that may name several numbers of steps."""
    return measure_entry(network, source, what, **arguments)


def ask_pgd(
    network: nn.Module, source: MemorySource, *, seed: int, batch_size: int = 7, **attack: Any
) -> EvaluationResult:
    """Evaluate PGD as a recipe states it."""
    what = evaluation_entry(kind="pgd", attack=AttackConfig(**attack))
    return ask(network, source, what, seed=seed, batch_size=batch_size)


def ask_autoattack(
    network: nn.Module,
    source: MemorySource,
    *,
    version: str,
    norm: str = "linf",
    eps: float,
    seed: int,
    attacks: tuple[str, ...] | None = None,
    batch_size: int = 256,
    **budget: Any,
) -> EvaluationResult:
    """Evaluate AutoAttack; ``attacks``: these alone; ``budget``: num_steps, num_queries, chunk_size as in a protocol."""
    attack = AttackConfig(norm=norm, eps=eps, num_steps=1, step_size=eps)
    what = evaluation_entry(kind="autoattack", version=version, attack=attack)
    protocol = build_protocol(
        what, weights=weights_hash(network), ids=source.sample_ids, num_classes=source.num_classes, seed=seed, **budget
    )
    if attacks is not None:
        protocol = dataclasses.replace(protocol, attacks=attacks)
    return ask(network, source, protocol, batch_size=batch_size)
