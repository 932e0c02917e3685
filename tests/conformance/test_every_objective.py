"""Every registered objective brings its facts, and the facts are true: passes are counted, nothing else knows names."""

from __future__ import annotations

from pathlib import Path

import pytest

import distributed_at
from distributed_at.objectives import OBJECTIVES, Objective
from distributed_at.objectives.pgd_at import PgdAt
from tests.conformance.objectives import conformance_of, settings_of
from tests.conformance.requirements import counted, missing, names_compared

CASES = [(name, fields) for name in OBJECTIVES.builtin for fields in settings_of(name)]
PACKAGE = Path(distributed_at.__file__).parent


@pytest.mark.parametrize("name", OBJECTIVES.builtin)
def test_objective_brings_all_that_is_asked_of_one(name: str) -> None:
    lacks = missing(name, OBJECTIVES[name], conformance_of(name), home=f"tests/conformance/objectives/{name}.py")
    assert not lacks, "\n".join(lacks)


def test_what_is_missing_is_said_in_sentences() -> None:
    class Bare(Objective):
        Config = PgdAt.Config

    said = "\n".join(missing("bare", Bare, None, home="tests/conformance/objectives/bare.py"))
    for words in ("no title", "no source", "does not say its passes", "names no section", "Config.name is not 'bare'",
                  "no conformance check", "no planted fault", "tests/conformance/objectives/bare.py"):  # fmt: skip
        assert words in said


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
def test_declared_passes_are_the_counted_ones(name: str, fields: dict, shared: bool) -> None:
    objective = OBJECTIVES[name]
    passes = objective.passes(objective.Config(**fields))
    found = counted(objective, fields, shared_statistics=shared)
    assert passes.total_trained == pytest.approx(found.total_trained)
    assert passes.watched == pytest.approx(found.watched)
    assert passes.attacked == found.attacked
    assert passes.moving == found.moving
    if not shared:  # with one norm for both, a joint forward goes by one name
        assert {k: v for k, v in passes.trained.items() if v} == pytest.approx(dict(found.trained))


@pytest.mark.parametrize(("name", "fields"), CASES, ids=str)
def test_branches_that_are_trained_are_the_declared_ones(name: str, fields: dict) -> None:
    objective = OBJECTIVES[name]
    trained = counted(objective, fields, shared_statistics=False).trained
    declared = objective.trains(objective.Config(**fields))
    assert set(declared) == set(trained)
    assert set(declared) <= set(objective.branches)


def test_nothing_outside_its_file_knows_an_objective_by_name() -> None:
    words = [f'"{name}"' for name in OBJECTIVES.builtin if name != "standard"]  # a word of AutoAttack's too
    for path in PACKAGE.rglob("*.py"):
        text, place = path.read_text(encoding="utf-8"), path.relative_to(PACKAGE).as_posix()
        assert not names_compared(text, "objective"), f"{place} compares objective.name"
        if not place.startswith("objectives/") and place != "catalogue/objectives.py":
            assert not [word for word in words if word in text], f"{place} knows an objective by name"
