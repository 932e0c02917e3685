"""Objectives that the package does not ship, each one file, added to the registry as a user's plug-in would be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from distributed_at.objectives import OBJECTIVES, Objective


@contextlib.contextmanager
def registered(*objectives: type[Objective]) -> Iterator[None]:
    """Let recipes name these objectives."""
    names = [objective.Config.model_fields["name"].default for objective in objectives]
    for name, objective in zip(names, objectives, strict=True):
        OBJECTIVES.add(name, objective, origin=objective.__module__)
    try:
        yield
    finally:
        for name in names:
            OBJECTIVES.remove(name)
