"""The list of planted faults is whole: each edit applies, compiles, and names tests that exist.

That the tests notice is shown by ``make mutations``, which plants them one by one.
"""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from tests.mutations.catalogue import LEAST, MUTATIONS
from tests.mutations.mutation import PACKAGE, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.what.replace(" ", "-") for m in MUTATIONS])
def test_fault_can_be_planted(mutation: Mutation) -> None:
    planted = mutation.planted((ROOT / PACKAGE / mutation.file).read_text())
    compile(planted, mutation.file, "exec")


def test_every_fault_names_a_test_that_exists_and_runs_by_default() -> None:
    trees: dict[str, ast.Module] = {}
    missing = []
    for mutation in MUTATIONS:
        for test in mutation.tests:
            file, *names = test.split("::")
            if file not in trees:
                trees[file] = ast.parse((ROOT / file).read_text())
            body: list[ast.stmt] = trees[file].body
            for name in names:
                found = [n for n in body if getattr(n, "name", None) == name.split("[")[0]]
                if not found or any(
                    mark in ast.unparse(d)
                    for d in getattr(found[0], "decorator_list", [])
                    for mark in ("mark.slow", "mark.gpu")
                ):
                    missing.append(f"{mutation.what}: {test}")
                    break
                body = getattr(found[0], "body", [])
    assert not missing


def test_every_room_has_its_faults() -> None:
    counts = Counter(m.room for m in MUTATIONS)
    short = {room: f"{counts[room]} of {least}" for room, least in LEAST.items() if counts[room] < least}
    assert not short


def test_descriptions_are_unique() -> None:
    assert len({m.what for m in MUTATIONS}) == len(MUTATIONS)
