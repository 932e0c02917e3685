"""What checks of objectives stand on: a forward that keeps every call, a batch, and building from a section."""

from __future__ import annotations

import torch

from distributed_at.batch import Batch
from distributed_at.config.objective import ObjectiveSection
from distributed_at.objectives import Objective
from distributed_at.objectives.base import ITSELF
from tests.conformance.networks import CLASSES, SHAPE, ids, images, labels, network
from tests.conformance.product import Product


class Recorder:
    """A forward as the engine lends it, with a small network behind it; keeps every call."""

    def __init__(self, *, shift_adv: float = 0.0) -> None:
        self.model = network(dtype=torch.float64)
        self.calls: list[dict] = []
        self.shift_adv = shift_adv

    def __call__(self, x, branch="adv", bn="train", grad=True, shares=None, ids=None):
        with torch.set_grad_enabled(grad):
            logits = self.model(x) + (self.shift_adv if branch == "adv" else 0.0)
        if grad:
            logits.retain_grad()
        self.calls.append({"x": x, "branch": branch, "bn": bn, "grad": grad, "logits": logits})
        return logits

    @property
    def moving(self) -> list[dict]:
        return [c for c in self.calls if c["bn"] == "train"]


def agrees(value: torch.Tensor, formula: torch.Tensor) -> bool:
    """Whether a float64 value is the formula's, up to the order of its sums."""
    assert value.dtype == formula.dtype == torch.float64, f"{value.dtype} and {formula.dtype}"
    return torch.allclose(value, formula, rtol=1e-12, atol=1e-13)


def batch_of(n: int = 12, group: int = 12) -> tuple[Batch, torch.Tensor]:
    x = images(n, dtype=torch.float64)
    adv = (x + 8 / 255).clamp(0, 1)
    return Batch(ids(n), x, labels(n), 3, 7, torch.arange(n) // group), adv


def build(
    product: Product,
    config: ObjectiveSection,
    *,
    norm: str = "bn",
    attack_branch: str = "adv",
    num_classes: int = CLASSES,
) -> Objective:
    context = product.objectives.ObjectiveContext(
        num_classes=num_classes,
        seed=0,
        shared_statistics=norm == "bn",
        attack_branch=attack_branch,
        places=64,
        image_size=SHAPE[-1],
    )
    built = product.objectives.build_objective(config, context)
    if built.needs(config).itself:
        built.views = {ITSELF: network(dtype=torch.float64)}
    return built
