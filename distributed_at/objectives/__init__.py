"""What one training step minimises, one file each: its section of a recipe, its facts and its loss.

Importing this, or an objective's file, does not import torch, so that a recipe is read without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from distributed_at.registry import Registry

if TYPE_CHECKING:
    from distributed_at.objectives.base import Objective

# before the other imports: the schema of a run, which they import, asks for it
OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective",
    field="objective.name",
    entry="distributed_at.objectives.base:Objective",
    builtin={
        "standard": "distributed_at.objectives.standard:Standard",
        "pgd_at": "distributed_at.objectives.pgd_at:PgdAt",
        "trades": "distributed_at.objectives.trades:Trades",
        "mixture": "distributed_at.objectives.mixture:Mixture",
    },
)

from distributed_at.config.objective import ObjectiveSection  # noqa: E402
from distributed_at.objectives.base import (  # noqa: E402
    BranchName,
    Forward,
    Needs,
    Objective,
    ObjectiveContext,
    Passes,
    Terms,
    check_declared,
    perturbed,
)


def build_objective(config: ObjectiveSection, context: ObjectiveContext) -> Objective:
    """Build the objective of a recipe from its section, and see that it keeps what it declares."""
    objective = OBJECTIVES[config.name](config, context)
    check_declared(objective)
    return objective


def recorded_objective(section: Mapping[str, Any]) -> tuple[type[Objective], ObjectiveSection] | None:
    """Return the objective and typed section of a run's recorded recipe; None where they are not known here."""
    name = section.get("name")
    if name not in OBJECTIVES:
        return None
    objective = OBJECTIVES[str(name)]
    try:
        return objective, objective.Config.model_validate(dict(section), strict=False)
    except ValidationError:  # of another version
        return None


__all__ = [
    "OBJECTIVES",
    "BranchName",
    "Forward",
    "Needs",
    "Objective",
    "ObjectiveContext",
    "Passes",
    "Terms",
    "build_objective",
    "check_declared",
    "perturbed",
    "recorded_objective",
]
