"""What one training step minimises, one file each: its section of a recipe, its facts and its loss.

Importing this, or an objective's file, does not import torch, so that a recipe is read without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import ValidationError

from distributed_at.catalogue import objectives as catalogue
from distributed_at.config.objective import ObjectiveSection
from distributed_at.objectives.base import (
    ITSELF,
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
from distributed_at.registry import Registry

OBJECTIVES = cast(Registry[type[Objective]], catalogue.OBJECTIVES)


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
    "ITSELF",
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
