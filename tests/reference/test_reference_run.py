"""What the product trains is what a loop written from the papers trains: weights, optimiser, average, statistics, log.

In float64 to 1e-10, on one and two ranks, with one and two forwards a step, over an epoch's end, milestones, the ends of
warm-ups and the switch to frozen statistics. As users train, in float32 with the compiled kernels, to 1e-5.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.reference import coverage
from tests.reference.cases import CASES, initial_state
from tests.reference.comparison import rows_apart, tensors_apart
from tests.reference.reference import Reference
from tests.reference.table import TABLE
from tests.reference.training import found, train_all

TOLERANCE = {True: 1e-10, False: 1e-5}  # in float64, in float32
INDEPENDENT = (
    "reference",
    "networks",
    "losses",
    "optimisers",
    "pgd",
    "schedules",
)  # files of the loop held beside the product
RUNS = [(name, world) for name, case in CASES.items() for world in case.worlds]


def _id(name: str, world: tuple[int, int]) -> str:
    return f"{name.replace(' ', '-')}-{world[0]}x{world[1]}"


@functools.cache
def _reference(name: str, forwards: int, changes: tuple[tuple[str, str, object], ...] = ()) -> Reference:
    """Return the reference after its run; ``changes`` are (section, field, value) in which its recipe differs."""
    config = CASES[name].config(CASES[name].worlds[0], Path("initial.pt"))
    recipe = config.model_dump()
    for section, field, value in changes:
        (recipe[section] if section else recipe)[field] = value
    run = Reference(recipe, initial_state(config), forwards=forwards)
    run.run()
    return run


def reference(name: str, world: tuple[int, int], *changes: tuple[str, str, object]) -> Reference:
    """Return the reference of a case; the cut into ranks and forwards matters where batch norm's group is left free."""
    free = CASES[name].config(world, Path("initial.pt")).train.bn_group_size is None
    return _reference(name, CASES[name].forwards(world) if free else 1, changes)


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> Path:
    """Train the cases that were asked for on two ranks, all in one pair of processes; return where runs live."""
    root = tmp_path_factory.mktemp("runs")
    asked = [
        item.callspec.params
        for item in request.session.items
        if item.fspath == request.path and "callspec" in vars(item)
    ]
    pairs = [(p["name"], p["world"]) for p in asked if p.get("world", (1, 1))[0] == 2]
    train_all([(name, world, str(root / _id(name, world))) for name, world in pairs])
    return root


@pytest.fixture
def product(folder):
    """Return a function that gives a case's tensors and log, training it where that is still to be done."""

    def of(name: str, world: tuple[int, int]):
        root = folder / _id(name, world)
        if not (root / "run").exists():
            train_all([(name, world, str(root))])
        return found(root)

    return of


@pytest.mark.parametrize(("name", "world"), RUNS, ids=[_id(*run) for run in RUNS])
def test_product_trains_what_the_reference_trains(name, world, product):
    tensors, rows = product(name, world)
    expected = reference(name, world)
    apart = {**tensors_apart(tensors, expected.tensors()), "log": rows_apart(rows, expected.rows)}
    worlds, largest = TABLE.setdefault(name, ([], {}))
    worlds.append(f"{world[0]}x{world[1]}")
    for kind, (difference, _) in apart.items():
        largest[kind] = max(difference, largest.get(kind, 0.0))
    far = {kind: where for kind, where in apart.items() if not where[0] <= TOLERANCE[CASES[name].double]}
    assert not far


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (("objective", "label_smoothing", 0.1 + 1e-7), "log"),
        (("optimizer", "weight_decay", 0.02 + 1e-7), "weights"),
        (("optimizer", "lr", 0.1 + 1e-7), "average"),
        (("model", "bn_momentum", 0.1 + 1e-7), "statistics"),
        (("attack", "eps", 51.000001), "log"),
        (("", "seed", 1), "log"),
    ],
    ids=lambda v: v if isinstance(v, str) else v[1],
)
def test_the_comparison_sees_a_millionth(change, kind, product):
    tensors, rows = product("pgd_at", (1, 1))
    other = reference("pgd_at", (1, 1), change)
    apart = {**tensors_apart(tensors, other.tensors()), "log": rows_apart(rows, other.rows)}
    assert apart[kind][0] > TOLERANCE[True]


def test_every_value_that_a_recipe_can_name_is_trained_by_a_case():
    assert not coverage.missing(), "give tests/reference/cases.py an entry"


def test_what_is_excused_exists():
    assert coverage.EXCUSED.keys() <= coverage.wanted().keys()


def test_the_reference_takes_nothing_from_the_product_but_its_random_numbers():
    taken: set[str] = set()
    for name in INDEPENDENT:
        for node in ast.walk(ast.parse((Path(__file__).parent / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                taken |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                taken |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in taken if name.split(".")[0] in ("distributed_at", "tests")}
    allowed = ("distributed_at.rng", *(f"tests.reference.{name}" for name in INDEPENDENT))
    assert [name for name in ours if not name.startswith(allowed)] == []


def test_two_ranks_have_cases_of_every_kind():
    assert {world for _, world in RUNS} >= {(1, 1), (1, 2), (2, 1), (2, 2)}
