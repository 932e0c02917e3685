"""What a kind of evaluation is: its section of a recipe, its protocol, what it costs, and its attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from distributed_at.config.evaluation import EvaluationEntry
from distributed_at.errors import ConfigError
from distributed_at.evaluation.protocol import Protocol

if TYPE_CHECKING:
    import torch

    from distributed_at.config import AttackConfig
    from distributed_at.evaluation.attacked import AttackedSamples

    Forward = Callable[[torch.Tensor], torch.Tensor]


class EvaluationKind:
    """Base of all kinds; a kind is never made into an object. Registered by name in ``KINDS``.

    Attributes:
        Config: what a recipe may say; a subclass of ``EvaluationEntry``.
        Record: what the number depends on, with the kind's own settings.
        attacked: whether the kind attacks at all.
        strength: place in tables: 0 no attack, then rising.
        batch_dependent: random numbers depend on the samples beside one another, so that a piece of work is computed
            whole, whichever of its rows are missing.
    """

    Config: ClassVar[type[EvaluationEntry]]
    Record: ClassVar[type[Protocol]]
    attacked: ClassVar[bool] = True
    strength: ClassVar[int] = 1
    batch_dependent: ClassVar[bool] = False

    @classmethod
    def attack_of(cls, entry: EvaluationEntry, training_attack: AttackConfig | None) -> AttackConfig | None:
        """Return the attack whose threat is measured: the entry's own, else the training attack's.

        Raises:
            ConfigError: there is neither.
        """
        attack = entry.attack or training_attack
        if attack is None:
            raise ConfigError(
                f"evaluation kind {entry.kind!r} needs attack: {{eps, ...}}: the run has no training attack"
            )
        return attack

    @classmethod
    def settings(cls, entry: EvaluationEntry, attack: AttackConfig | None, num_classes: int) -> dict[str, Any]:
        """Return the fields of the protocol that are this kind's own."""
        raise NotImplementedError

    @classmethod
    def short_name(cls, entry: EvaluationEntry) -> str:
        """Return the name that ``eval --only`` knows an entry without a name of its own by."""
        return entry.kind

    @classmethod
    def paper_names(cls, details: Mapping[str, Any]) -> set[str]:
        """Return the names, such as ``pgd10x5``, under which a paper's table prints the number of a recorded protocol."""
        return {str(details.get("kind"))}

    @classmethod
    def single_entries(cls, entry: EvaluationEntry) -> Sequence[EvaluationEntry]:
        """Return an entry as one entry a protocol; a kind may measure several in one pass."""
        return [entry]

    @classmethod
    def is_targeted(cls, entry: EvaluationEntry) -> bool:
        """Whether the attack aims at chosen classes, so that its number compares with targeted ones alone."""
        return False

    @classmethod
    def forward_units(cls, entry: EvaluationEntry) -> float | None:
        """Return the forward-equivalents of one image; None where they depend on who survives."""
        raise NotImplementedError

    @classmethod
    def pieces(cls, protocol: Protocol, ids: np.ndarray, missing: np.ndarray, batch_size: int) -> list[np.ndarray]:
        """Cut the samples that lack a row into pieces of work; ``ids`` are all of the protocol, sorted."""
        return [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]

    @classmethod
    def attack(
        cls,
        forward: Forward,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        ids: torch.Tensor,
        piece: np.ndarray,
        protocol: Any,
        on_the_way: dict[int, AttackedSamples],
    ) -> AttackedSamples | None:
        """Attack samples; None where the kind makes no attack.

        Args:
            forward: x -> logits (N, K), normalisation inside, in eval mode.
            x: (N, C, H, W) float32 in [0, 1]; y: (N,) int64.
            ids: (N,) int64 sample ids of x.
            piece: ids of the whole piece of work, also of samples that are not attacked.
            on_the_way: keys are fewer numbers of steps, whose outcomes are filled in.
        """
        raise NotImplementedError
