"""Clean accuracy: predictions of the images as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from distributed_at.config.evaluation import EvaluationEntry
from distributed_at.evaluation.kinds.base import EvaluationKind
from distributed_at.evaluation.protocol import Protocol

if TYPE_CHECKING:
    from distributed_at.config import AttackConfig


@dataclass(frozen=True, kw_only=True)
class CleanProtocol(Protocol):
    """Nothing beside what every accuracy depends on."""


class Clean(EvaluationKind):
    """Share of images that are classified correctly without an attack."""

    class Config(EvaluationEntry):
        """Clean accuracy."""

        kind: Literal["clean"] = "clean"

        @model_validator(mode="after")
        def _no_attack(self) -> Clean.Config:
            if self.attack is not None:
                raise ValueError("kind 'clean' makes no attack: remove attack, or use kind: pgd")
            return self

    Record = CleanProtocol
    attacked: ClassVar[bool] = False
    strength: ClassVar[int] = 0

    @classmethod
    def attack_of(cls, entry: EvaluationEntry, training_attack: AttackConfig | None) -> None:
        return None

    @classmethod
    def settings(cls, entry: EvaluationEntry, attack: AttackConfig | None, num_classes: int) -> dict[str, Any]:
        return {}

    @classmethod
    def paper_names(cls, details: Mapping[str, Any]) -> set[str]:
        return {"clean", "natural", "nat"}

    @classmethod
    def forward_units(cls, entry: EvaluationEntry) -> float:
        return 1.0

    @classmethod
    def attack(cls, *_: Any, **__: Any) -> None:
        return None
