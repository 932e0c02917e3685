"""What is measured, while training and after it; what one kind of evaluation may say stands in ``evaluation/kinds/``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from distributed_at.catalogue.evaluations import KINDS
from distributed_at.config.attack import AttackConfig
from distributed_at.config.base import Branch, Strict
from distributed_at.config.choice import Section

# Fields that recipes of earlier runs hold for every kind, with the values that mean nothing.
_ONCE_COMMON: dict[str, tuple[Any, ...]] = {"version": ("standard",), "checkpoints": ([], ())}


class EvaluationEntry(Strict):
    """One evaluation of a recipe: what every kind may say. ``kind`` chooses the class."""

    kind: str
    name: str | None = Field(default=None, description="name in tables; null = made from the protocol")
    attack: AttackConfig | None = Field(
        default=None, description="null = the training attack's threat with this protocol's own defaults"
    )
    branch: Branch | None = Field(default=None, description="null = adv, or both in turn for mbn")
    num_samples: int | None = Field(default=None, gt=0, description="null = the whole split")
    batch_size: int = Field(default=256, gt=0)

    @model_validator(mode="after")
    def _nothing_of_training(self) -> EvaluationEntry:
        if self.attack is not None:
            for name in ("eps_warmup_epochs", "early_stop_epochs", "step_noise"):
                if getattr(self.attack, name):
                    raise ValueError(f"attack.{name} belongs to training: remove it from an evaluation's attack")
        return self

    @classmethod
    def earlier_spelling(cls, section: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out fields of other kinds that an earlier version wrote into every entry, where they say nothing."""
        return {
            key: value
            for key, value in section.items()
            if key in cls.model_fields or key not in _ONCE_COMMON or value not in _ONCE_COMMON[key]
        }


class EvaluationConfig(Strict):
    """What is measured while training (on held-out training images) and after it (on the test set)."""

    every_epochs: float | None = Field(default=1.0, gt=0)
    validation: tuple[Annotated[EvaluationEntry, Section(KINDS, tag="kind")], ...] = ()
    final: tuple[Annotated[EvaluationEntry, Section(KINDS, tag="kind")], ...] = Field(
        default=({"kind": "clean"},), validate_default=True
    )


def evaluation_entry(**fields: Any) -> EvaluationEntry:
    """Return an entry of the kind that ``kind`` names, e.g. ``evaluation_entry(kind="pgd", attack=...)``.

    Raises:
        ConfigError: there is no such kind.
    """
    return KINDS[str(fields.get("kind"))].Config(**fields)
