"""The kinds of evaluation that a recipe can name. Each is a class in a file of its own in ``evaluation/kinds/``."""

from __future__ import annotations

from typing import Any, Protocol

from distributed_at.registry import Registry


class KindFacts(Protocol):
    """What schema and records ask a kind's class; ``evaluation/kinds/base.py`` says what each means."""

    Config: Any
    Record: Any
    attacked: bool

    def attack_of(self, entry: Any, attack: Any, /) -> Any:
        """Return the attack that an entry stands for under a recipe's training attack."""

    def settings(self, entry: Any, attack: Any, num_classes: int, /) -> dict[str, Any]:
        """Return the fields of its record."""


KINDS: Registry[KindFacts] = Registry(
    "evaluation kind",
    field="evaluation.kind",
    entry="distributed_at.evaluation.kinds.base:EvaluationKind",
    builtin={
        "clean": "distributed_at.evaluation.kinds.clean:Clean",
        "pgd": "distributed_at.evaluation.kinds.pgd:Pgd",
        "autoattack": "distributed_at.evaluation.kinds.autoattack:AutoAttack",
    },
)
