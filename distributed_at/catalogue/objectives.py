"""The objectives that a recipe can name. Each is a class in a file of its own in ``objectives/``, which says its facts."""

from __future__ import annotations

from typing import Any, Protocol

from distributed_at.registry import Registry


class ObjectiveFacts(Protocol):
    """What the schema asks an objective's class; ``objectives/base.py`` says what each means."""

    Config: Any
    branches: tuple[str, ...]
    attack_losses: tuple[str, ...]

    def needs(self, config: Any, /) -> Any:
        """Return what it needs around it."""

    def trains(self, config: Any, /) -> tuple[str, ...]:
        """Return the branches that it trains."""

    def refuse(self, run: Any, /) -> str | None:
        """Return why it does not go with the rest of a recipe."""


OBJECTIVES: Registry[ObjectiveFacts] = Registry(
    "objective",
    field="objective.name",
    entry="distributed_at.objectives.base:Objective",
    builtin={
        "standard": "distributed_at.objectives.standard:Standard",
        "pgd_at": "distributed_at.objectives.pgd_at:PgdAt",
        "trades": "distributed_at.objectives.trades:Trades",
        "mart": "distributed_at.objectives.mart:Mart",
        "free_at": "distributed_at.objectives.free_at:FreeAt",
        "mixture": "distributed_at.objectives.mixture:Mixture",
    },
)
