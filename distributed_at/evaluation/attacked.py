"""What an attack did to a batch, judged by asking the model again about images forced into the ball and the box."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distributed_at.attacks.threat import Threat
from distributed_at.catalogue.attacks import BALLS
from distributed_at.errors import UserError
from distributed_at.logits import predicted_classes


class ThreatViolationError(UserError):
    """An attack returned images outside its ball or box, so its numbers would mean nothing."""


def perturbation_size(adv: torch.Tensor, x: torch.Tensor, *, norm: str) -> torch.Tensor:
    """Return the (N,) float64 size of ``adv - x`` in a norm: ``linf``, ``l2`` …"""
    return BALLS[norm].load().size(adv.double() - x.double())


def inside_ball(adv: torch.Tensor, x: torch.Tensor, *, eps: float, norm: str) -> torch.Tensor:
    """Return ``adv`` with its last rounding errors removed, so that ball and pixel box hold in float32.

    A float32 image near 1 cannot state a distance better than 6e-8, so attacks leave the ball by that much even where
    they project; more than that (and than a relative 1e-6) is a fault of the attack and raises.

    Args:
        adv, x: (N, C, H, W) float32; ``eps`` in [0, 1] units.

    Raises:
        ThreatViolationError: on NaN, or where the ball or the box is left by more than rounding.
    """
    if not torch.isfinite(adv).all():
        raise ThreatViolationError("the attack returned images that are not finite")
    rounding = BALLS[norm].load().rounding(x[0].numel())
    size = perturbation_size(adv, x, norm=norm)
    if (size > eps * (1 + 1e-6) + rounding).any():
        raise ThreatViolationError(
            f"the attack moved an image by {size.max().item():.6g} in {norm}; the radius is {eps:.6g} ([0, 1] units)"
        )
    if adv.min() < -1e-6 or adv.max() > 1 + 1e-6:
        raise ThreatViolationError(f"the attack left the pixel box: [{adv.min():.6g}, {adv.max():.6g}]")
    return Threat(norm, eps).project(adv, x)


@dataclass
class AttackedSamples:
    """State of N attacked samples; filled by ``record`` as attacks and restarts go on.

    Attributes:
        prediction: (N,) int64, the class at the image that broke the sample, else at the last attacked image; NO_CLASS
            where the logits there are not finite.
        broken: (N,) bool, some attack made the model wrong.
        loss: (N,) float64, cross-entropy of the label at that image (the highest seen where nothing broke it).
        attack: (N,) int64, number of the attack that broke the sample, -1 where none did.
        target_hit: (N,) bool, a target class was reached.
    """

    prediction: torch.Tensor
    broken: torch.Tensor
    loss: torch.Tensor
    attack: torch.Tensor
    target_hit: torch.Tensor

    @classmethod
    def unbroken(cls, y: torch.Tensor) -> AttackedSamples:
        """Return the outcome of no attack on correctly classified samples with labels ``y`` (N,)."""
        return cls(
            prediction=y.clone(),
            broken=torch.zeros_like(y, dtype=torch.bool),
            loss=torch.full(y.shape, float("-inf"), dtype=torch.float64, device=y.device),
            attack=torch.full_like(y, -1),
            target_hit=torch.zeros_like(y, dtype=torch.bool),
        )

    def record(
        self,
        index: torch.Tensor,
        logits: torch.Tensor,
        loss: torch.Tensor,
        y: torch.Tensor,
        attack: int,
        targets: torch.Tensor | None = None,
    ) -> None:
        """Take in an attack's result on the samples at ``index`` (M,): logits (M, K), loss (M,), labels (M,).

        A sample stays broken once it is; its prediction and loss are those of the image that broke it first.
        """
        predicted = predicted_classes(logits)
        if targets is not None:
            self.target_hit[index] |= predicted == targets
        fresh = ~self.broken[index]
        wrong = (predicted != y) & fresh
        higher = fresh & (wrong | (loss.double() > self.loss[index]))
        self.loss[index[higher]] = loss.double()[higher]
        self.prediction[index[fresh]] = predicted[fresh]
        self.attack[index[wrong]] = attack
        self.broken[index[wrong]] = True
