"""Every entry of ``catalogue/attacks.py`` brings a check against its source and a planted fault, or this says what is missing."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

import distributed_at
from distributed_at.catalogue import attacks
from distributed_at.registry import Registry
from tests.conformance.checks_attack_entries import PROVED_BY
from tests.conformance.test_conformance import CHECKS
from tests.conformance.test_mutations import MUTATIONS

REGISTRIES = [value for value in vars(attacks).values() if isinstance(value, Registry)]
ENTRIES = [(registry, name) for registry in REGISTRIES for name in registry.builtin]
PACKAGE = Path(distributed_at.__file__).parent
HOME = "tests/conformance/checks_attack_entries.py"


def missing(registry: Registry[Any], name: str, proved: dict[tuple[str, str], str]) -> list[str]:
    """Return a sentence for each thing that an entry lacks."""
    entry, lacks = registry[name], []
    if not entry.title:
        lacks.append(f"{registry.kind} {name!r} has no title")
    check = proved.get((registry.kind, name))
    if check not in CHECKS:
        lacks.append(
            f"{registry.kind} {name!r} has no conformance check: compare it with its source and name it in {HOME}"
        )
    elif not [m for m in MUTATIONS if m.caught_by == check and _touches(m, entry)]:
        lacks.append(f"{registry.kind} {name!r} has no planted fault that {check} catches, in its own code")
    return lacks


def _touches(mutation: Any, entry: Any) -> bool:
    """Whether a fault is planted in what an entry loads, or in the file that says its facts."""
    loaded = entry.load() if hasattr(entry, "load") and getattr(entry, "choose", True) is not None else None
    if loaded is None:
        return True  # part of the attack itself
    source = inspect.getsource(loaded if inspect.isfunction(loaded) else type(loaded))
    lines = [line.strip() for line in mutation.old.strip().splitlines()]
    return all(line in source for line in lines) or mutation.file in ("attacks/balls.py", "attacks/targets.py")


@pytest.mark.parametrize(("registry", "name"), ENTRIES, ids=lambda v: v if isinstance(v, str) else v.kind)
def test_entry_brings_all_that_is_asked_of_one(registry: Registry[Any], name: str) -> None:
    lacks = missing(registry, name, PROVED_BY)
    assert not lacks, "\n".join(lacks)


def test_what_is_missing_is_said_in_sentences() -> None:
    registry = attacks.ATTACK_LOSSES
    registry.add("bare", attacks.AttackLoss(title="", source="", function=lambda z, goal: z.sum(1)), origin="a test")
    try:
        said = "\n".join(missing(registry, "bare", PROVED_BY))
        assert "'bare' has no title" in said
        assert f"'bare' has no conformance check: compare it with its source and name it in {HOME}" in said
        said = "\n".join(missing(registry, "bare", {("attack loss", "bare"): "margin_is_its_formula"}))
        assert "has no planted fault that margin_is_its_formula catches" in said
    finally:
        registry.remove("bare")


def test_nothing_outside_its_file_compares_an_attack_s_words() -> None:
    """Facts are asked of entries: ``== "kl"`` somewhere else is what a new entry would be forgotten at."""
    words = {name for registry, name in ENTRIES if name not in ("none", "zero", "explicit", "uniform")}
    fields = ("norm", "loss", "start", "target", "update", "step_rule")
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                literal = {s.value for s in sides if isinstance(s, ast.Constant)}
                asked = [ast.unparse(s).rsplit(".", 1)[-1] for s in sides]
                where = f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
                assert not literal & words, where
                assert not (literal & {"none", "zero", "uniform", "explicit"} and set(asked) & set(fields)), where
