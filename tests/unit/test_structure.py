"""Modules point one way: no circle of imports, those for type hints and those inside functions counted."""

from __future__ import annotations

import ast
from pathlib import Path

import distributed_at

PACKAGE = Path(distributed_at.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(module: str) -> set[str]:
    """Return the package's modules that one imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    deepest = {name for name in found if not any(other.startswith(f"{name}.") and other in MODULES for other in found)}
    return (deepest & set(MODULES)) - {module}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that reach each other, each sorted."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            for following in graph[waiting.pop()] - seen:
                seen.add(following)
                waiting.append(following)
        reach[start] = seen
    groups = {tuple(sorted({a} | {b for b in reach[a] if a in reach[b]})) for a in graph if a in reach[a]}
    return sorted(map(list, groups))


def test_a_circle_would_be_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}
    assert circles(graph) == [["a", "b", "c"]]
    assert len(MODULES) > 150
    assert "distributed_at.attacks.pgd" in imported("distributed_at.attacks")


def test_no_modules_import_each_other() -> None:
    assert circles({module: imported(module) for module in MODULES}) == []


def test_what_a_recipe_can_name_depends_on_no_room() -> None:
    """The catalogue is asked by all; it names what it loads by text, or for type hints alone."""
    for module in MODULES:
        if module.startswith("distributed_at.catalogue."):
            tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
            top = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
            names = {node.module for node in top if node.module and node.module.startswith("distributed_at")}
            assert names <= {"distributed_at.registry", "distributed_at.errors", "distributed_at.user_code"}, module
