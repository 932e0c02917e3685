"""What an attack reports beside its images."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """How each image stood along the way, at chosen numbers of steps of one and the same trajectory.

    Attributes:
        checkpoints: T numbers of steps; 0 is the start.
        correct: (T, N) bool, the image is still given its label right after that many steps, in every restart.
        loss: (T, N) attack objective there, the greatest over restarts.
    """

    checkpoints: tuple[int, ...]
    correct: torch.Tensor
    loss: torch.Tensor

    def merge(self, other: Trajectory) -> Trajectory:
        """Return the union over two restarts."""
        return Trajectory(
            checkpoints=self.checkpoints,
            correct=self.correct & other.correct,
            loss=torch.maximum(self.loss, other.loss),
        )


@dataclass(frozen=True, kw_only=True)
class AttackResult:
    """Adversarial images and how they did.

    Attributes:
        adv: (N, C, H, W), detached, inside ball and box.
        loss: (N,) attack objective at adv (what the attack maximised; targeted objectives grow towards the target).
        correct: (N,) bool, adv is still given its label. This, not reaching a target, is what robust accuracy counts.
        predictions: (N,) int64 classes given to adv.
        targets: (N,) int64, or None for untargeted attacks.
        steps: gradient steps made on each image, over all restarts.
        trajectory: at the checkpoints asked for, or None.
    """

    adv: torch.Tensor
    loss: torch.Tensor
    correct: torch.Tensor
    predictions: torch.Tensor
    targets: torch.Tensor | None
    steps: int
    trajectory: Trajectory | None = None

    @property
    def success(self) -> torch.Tensor:
        """(N,) bool, the image is misclassified."""
        return ~self.correct

    def better_of(self, other: AttackResult) -> AttackResult:
        """Return per image the better restart: the one that fools, then the one of higher loss; ties keep ``self``."""
        fools_alone = self.correct & ~other.correct
        higher = (self.correct == other.correct) & (other.loss > self.loss)
        take = fools_alone | higher
        trajectory = self.trajectory
        if trajectory is not None and other.trajectory is not None:
            trajectory = trajectory.merge(other.trajectory)
        return AttackResult(
            adv=torch.where(take.reshape(-1, *([1] * (self.adv.dim() - 1))), other.adv, self.adv),
            loss=torch.where(take, other.loss, self.loss),
            correct=torch.where(take, other.correct, self.correct),
            predictions=torch.where(take, other.predictions, self.predictions),
            targets=self.targets,
            steps=self.steps + other.steps,
            trajectory=trajectory,
        )
