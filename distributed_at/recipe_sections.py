"""Sections whose fields depend on a name in them: what one inherits from another and does not have is dropped."""

from __future__ import annotations

from typing import Any

from distributed_at.catalogue.optimizers import OPTIMIZERS
from distributed_at.catalogue.schedules import SCHEDULES
from distributed_at.config import ModelConfig, OptimizerConfig, ScheduleConfig
from distributed_at.config.choice import unread
from distributed_at.recipe_errors import chosen_sections
from distributed_at.recipe_nodes import Node, merge
from distributed_at.registry import Registry

# Sections of one class whose entries read different fields of it.
_ENTRIES: dict[str, tuple[type[OptimizerConfig | ScheduleConfig], Registry[Any]]] = {
    "optimizer": (OptimizerConfig, OPTIMIZERS),
    "schedule": (ScheduleConfig, SCHEDULES),
}


def lay(base: Node, over: Node) -> Node:
    """Merge, and drop what a section of another name inherits but does not have."""
    for key in (*chosen_sections(), *_ENTRIES):
        section = over.child(key)
        base = switch_section(base, key, section.child("name") if section is not None else None)
    model = over.child("model")
    base = switch_network(base, model.child("arch") if model is not None else None)
    return merge(base, over)


def switch_network(base: Node, arch: Node | None) -> Node:
    """Drop what another network inherits but does not have: its layout, and all fields of ours where it is not ours."""
    model = base.child("model")
    before = model.child("arch") if model is not None else None
    if arch is None or model is None or before is None or not isinstance(arch.value, str) or arch.value == before.value:
        return base
    kept = {key: child for key, child in model.items() if ModelConfig.survives(key, arch.value)}
    return Node({**base.value, "model": Node(kept, model.source)}, base.source)


def switch_section(base: Node, key: str, name: Node | None) -> Node:
    """Drop what a section of another ``name`` inherits but does not have."""
    section = base.child(key)
    if name is None or section is None or not isinstance(section.value, dict):
        return base
    if key in _ENTRIES:
        return _switch_entry(base, key, section, name)
    if key not in chosen_sections():
        return base
    chosen = chosen_sections()[key]
    current = section.child("name")
    if name.value == (chosen.default if current is None else current.value):
        return base
    fields = chosen.classes()[name.value].model_fields if name.value in chosen.registry else {}
    kept = {field: child for field, child in section.items() if field in fields}
    return Node({**base.value, key: Node(kept, section.source)}, base.source)


def _switch_entry(base: Node, key: str, section: Node, name: Node) -> Node:
    """Drop what the entry ``name`` does not read, where the section named another one."""
    config, registry = _ENTRIES[key]
    before = section.child("name")
    if name.value == (config.model_fields["name"].default if before is None else before.value):
        return base
    dropped = unread(registry, name.value) if isinstance(name.value, str) and name.value in registry else frozenset()
    kept = {field: child for field, child in section.items() if field not in dropped}
    return Node({**base.value, key: Node(kept, section.source)}, base.source)
