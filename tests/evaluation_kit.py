"""A small network on digits and images in memory: what the evaluation's tests evaluate."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from distributed_at.evaluation import EvaluationResult, Execution, Subject, evaluate, evaluate_entry


class TinyNet(nn.Module):
    """Two convolutions with BN and dropout, called as every model is: ``model(x)``."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16 * 16, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.norm(self.first(x)))
        return self.head(self.drop(F.relu(self.second(h)).flatten(1)))


class MemorySource:
    """Images in memory with ids that are not positions, as a split carved out of a published one has."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, *, num_classes: int = 10, first_id: int = 0) -> None:
        self.images, self.all_labels, self.num_classes = images, labels, num_classes
        self.split, self.name = "test", "digits"
        self.sample_ids = first_id + 3 * np.arange(len(labels), dtype=np.int64)
        self.first_id = first_id
        self.read_ids: list[int] = []

    @property
    def num_samples(self) -> int:
        return len(self.sample_ids)

    def read(self, ids, *, epoch, train, seed=None):
        assert not train, "an evaluation must never ask for augmented views"
        self.read_ids += [int(i) for i in ids]
        rows = torch.from_numpy((np.asarray(ids) - self.first_id) // 3)
        return self.images[rows], self.all_labels[rows]


@lru_cache(maxsize=4)
def digits(num_classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uint8 images (N, 1, 8, 8) and labels (N,) of the first ``num_classes`` digits."""
    data = load_digits()
    keep = data.target < num_classes
    images = torch.from_numpy((data.images[keep] * 255 / 16).round().astype(np.uint8)).unsqueeze(1)
    return images, torch.from_numpy(data.target[keep].astype(np.int64))


def trained(num_classes: int = 10, *, steps: int = 120, eps: float = 0.0) -> TinyNet:
    """Return a TinyNet trained for a second: naturally, or on single-step perturbations of radius ``eps``."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.set_num_threads(1)
        model = TinyNet(num_classes)
        images, labels = digits(num_classes)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(steps):
            rows = torch.randperm(len(labels))[:128]
            x, y = images[rows].float() / 255, labels[rows]
            if eps:
                x.requires_grad_(True)
                (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
                x = (x + eps * gradient.sign()).clamp(0, 1).detach()
            for group in optimiser.param_groups:
                group["lr"] = 0.01 * (1 - step / steps)
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
    optimiser.zero_grad()
    return model.train()


def source(num_classes: int = 10, *, size: int = 100, first_id: int = 7) -> MemorySource:
    """Return the last ``size`` digits."""
    images, labels = digits(num_classes)
    return MemorySource(images[-size:], labels[-size:], num_classes=num_classes, first_id=first_id)


_SUBJECT = {"branch", "training_attack", "seed", "description", "weights"}
_EXECUTION = {"folder", "device", "batch_size", "rank", "world_size", "on_progress", "alive"}


def _sorted_out(network: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    subject = Subject(network=network, **{k: options.pop(k) for k in _SUBJECT & set(options)})
    execution = Execution(**{k: options.pop(k) for k in _EXECUTION & set(options)})
    return {"subject": subject, "execution": execution, **options}


def measure(network: nn.Module, source: Any, what: Any, **options: Any) -> EvaluationResult:
    """``evaluate`` with the fields of ``Subject`` and ``Execution`` given flat."""
    return evaluate(source=source, what=what, **_sorted_out(network, options))


def measure_entry(network: nn.Module, source: Any, entry: Any, **options: Any) -> list[EvaluationResult]:
    """``evaluate_entry`` likewise."""
    return evaluate_entry(source=source, entry=entry, **_sorted_out(network, options))
