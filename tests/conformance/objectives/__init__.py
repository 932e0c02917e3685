"""One file an objective, called as it is in a recipe: settings worth trying, checks against its paper, planted faults.

``SETTINGS``: fields of its section beside ``name``; the first is what other suites run it with. ``WORDS``: overrides of
other sections that it needs there, if any. ``CHECKS``: functions of
a ``Product`` that compare it in float64 with the paper's formula. ``MUTATIONS``: faults in its file that they catch.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

from distributed_at.config.objective import ObjectiveSection
from distributed_at.objectives import OBJECTIVES


def conformance_of(name: str) -> ModuleType | None:
    """Return the file of an objective's conformance, None where it has none."""
    if importlib.util.find_spec(f"{__name__}.{name}") is None:
        return None
    return importlib.import_module(f"{__name__}.{name}")


def settings_of(name: str) -> list[dict[str, Any]]:
    """Return the fields that it is tried with, one dict a setting; its defaults where no file says more."""
    return getattr(conformance_of(name), "SETTINGS", None) or [{}]


def words_of(name: str) -> list[str]:
    """Return the overrides of other sections that a recipe of another objective needs for it."""
    return list(getattr(conformance_of(name), "WORDS", []))


def sections() -> list[ObjectiveSection]:
    """Return every setting of every objective that the package ships."""
    return [OBJECTIVES[name].Config(**fields) for name in OBJECTIVES.builtin for fields in settings_of(name)]


MODULES: list[ModuleType] = [module for name in OBJECTIVES.builtin if (module := conformance_of(name)) is not None]
