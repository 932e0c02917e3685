"""Objectives that use what the interface has room for: repeated batches, networks of their own, changed weights, gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from distributed_at.batch import EXTRA, Batch
from distributed_at.config.objective import ObjectiveSection
from distributed_at.objectives import Forward, Needs, Objective, ObjectiveContext, Passes, Terms, perturbed
from distributed_at.objectives.pgd_at import PgdAt


class Free(Objective):
    """Each batch is used several times, and one backward serves weights and images (Shafahi et al. 2019, algorithm 1)."""

    class Config(ObjectiveSection):
        name: Literal["free"] = "free"
        repeats: int = 2

    config: Config
    title = "free adversarial training"
    source = "Shafahi et al., Adversarial training for free!, NeurIPS 2019"
    branches = ("adv",)

    @classmethod
    def needs(cls, config: Config) -> Needs:
        return Needs(attack="own", state=True, repeats=config.repeats)

    @classmethod
    def passes(cls, config: Config) -> Passes:
        return Passes(trained={"adv": 1.0}, moving=("adv",))

    def __init__(self, config: Config, context: ObjectiveContext) -> None:
        super().__init__(config, context)
        self.delta = torch.zeros(context.places, 3, context.image_size, context.image_size, device=context.device)

    def place_tensors(self) -> dict[str, torch.Tensor]:
        return {"delta": self.delta}

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        assert adv is None
        delta = self._rows(batch)
        self.shown = (batch.images + (0.0 if delta is None else delta)).clamp(0, 1).requires_grad_()
        logits = forward(self.shown, branch="adv")
        loss = F.cross_entropy(logits, batch.labels)
        return Terms(loss, {"adv_loss": loss.detach()}, {"adv": logits.detach()})

    def before_step(self, network: nn.Module, batch: Batch, *, last: bool) -> None:
        delta, eps = self._rows(batch), self.context.eps(batch.step)
        if delta is not None:
            delta.add_(eps * self.shown.grad.sign()).clamp_(-eps, eps)

    def _rows(self, batch: Batch) -> torch.Tensor | None:
        return None if batch.place is None else self.delta[batch.place : batch.place + len(batch)]


class Taught(Objective):
    """Soft targets of a frozen teacher, a companion that follows, weights changed around the loss, extra images at half weight."""

    class Config(ObjectiveSection):
        name: Literal["taught"] = "taught"
        teacher: str | None = None

    config: Config
    title = "taught"
    source = "of the tests, section 1"
    branches = ("adv",)

    @classmethod
    def needs(cls, config: Config) -> Needs:
        return Needs(networks=("teacher", "companion"))

    @classmethod
    def passes(cls, config: Config) -> Passes:
        return Passes(trained={"adv": 1.0}, moving=("adv",))

    def __init__(self, config: Config, context: ObjectiveContext) -> None:
        super().__init__(config, context)
        assert context.new_network is not None
        self.teacher = context.new_network(config.teacher)
        self.companion = context.new_network(None)

    def networks(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher, "companion": self.companion}

    def prepare(self, batch: Batch) -> Batch:
        with torch.no_grad():
            told = self.views["teacher"](batch.images) + self.views["companion"](batch.images)
        return replace(batch, soft_labels=told.softmax(dim=1))

    def around(self, network: nn.Module, batch: Batch, adv: torch.Tensor | None) -> AbstractContextManager[None]:
        return perturbed(network, {name: 0.01 * weight.detach() for name, weight in network.named_parameters()})

    def loss(self, forward: Forward, batch: Batch, adv: torch.Tensor | None) -> Terms:
        assert batch.soft_labels is not None
        logits = forward(adv, branch="adv")
        losses = F.cross_entropy(logits, batch.soft_labels, reduction="none")
        if batch.origin is not None:
            losses = torch.where(batch.origin == EXTRA, 0.5, 1.0) * losses
        return Terms(losses.mean(), {"adv_loss": losses.mean().detach()}, {"adv": logits.detach()})

    def before_step(self, network: nn.Module, batch: Batch, *, last: bool) -> None:
        if last:
            with torch.no_grad():
                for own, live in zip(self.companion.parameters(), network.parameters(), strict=True):
                    own.lerp_(live, 0.1)


class Halved(PgdAt):
    """PGD training whose gradients are halved before the step, as a clipping objective would change them; section 1."""

    class Config(PgdAt.Config):
        name: Literal["halved"] = "halved"  # type: ignore[assignment]

    @classmethod
    def needs(cls, config: PgdAt.Config) -> Needs:
        return Needs(gradients=True)

    def before_step(self, network: nn.Module, batch: Batch, *, last: bool) -> None:
        if last:
            for parameter in network.parameters():
                parameter.grad.mul_(0.5)
