"""The part of an objective's section that every objective has; the rest stands with each objective, in ``objectives/``."""

from __future__ import annotations

from distributed_at.config.base import Strict


class ObjectiveSection(Strict):
    """Base of ``Objective.Config``; a subclass gives ``name`` its default and adds its own fields."""

    name: str
