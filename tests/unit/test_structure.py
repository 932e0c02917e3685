"""Modules point one way: no circle of imports, those for type hints and those inside functions counted."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

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


_ALONE = """
import importlib, os, sys
import numpy, pydantic, scipy.stats, torch, torch.distributed, torch.fx, torchvision  # each child begins with these
for module in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            importlib.import_module(module)
        except BaseException as error:
            print(f"{module}: {type(error).__name__}: {error}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def unimportable(modules: list[str]) -> str:
    """Return what went wrong where each module is the first of the package that a process imports."""
    told = subprocess.run([sys.executable, "-c", _ALONE, *modules], capture_output=True, text=True, check=True)
    return told.stdout


def is_a_door(module: str) -> bool:
    """Whether a user's file begins with it: a room, or what a plug-in is made from."""
    return MODULES[module].name == "__init__.py" or module.endswith(".base") or ".kinds." in module


def test_doors_can_be_imported_first() -> None:
    """No text shows it: a module may load another by its name while classes are being made."""
    doors = sorted(filter(is_a_door, MODULES))
    assert "distributed_at.evaluation.kinds.base" in doors
    assert unimportable(doors) == ""


@pytest.mark.slow
def test_every_module_can_be_imported_first() -> None:
    assert unimportable(sorted(module for module in MODULES if not module.endswith("__main__"))) == ""
