"""Every row of Xie & Yuille's tables has a recipe with the printed numbers, and each can run at its full world size."""

from collections import Counter

import pytest

from distributed_at.planning import make_plan, measure_model
from distributed_at.recipes import list_recipes, load_recipe
from tests.xie_yuille_tables import printed

TITLE = "Intriguing properties of adversarial training at scale"
IMAGES_A_GPU = 32
CURVES = {"Figure 1": 6, "Figure 2": 3, "Figure 3": 2, "Figure 7": 10}


@pytest.fixture(scope="module")
def entries():
    return [e for e in list_recipes() if e.ref.startswith("imagenet/") and "#" in e.ref and e.paper]


@pytest.mark.parametrize("table", sorted(printed()))
def test_each_printed_row_has_one_recipe_with_its_numbers(entries, table):
    ours = Counter(tuple(sorted(e.paper.numbers.items())) for e in entries if e.paper.table == table)
    theirs = Counter(tuple(sorted(row.items())) for row in printed()[table])
    assert ours == theirs


def test_each_curve_and_point_of_the_figures_has_one_recipe(entries):
    assert Counter(e.paper.table for e in entries if e.paper.table in CURVES) == CURVES


def test_rows_of_figures_carry_the_numbers_of_table_7(entries):
    final = {row["pgd2000"] for row in printed()["Table 7"]} | {None}
    for entry in entries:
        if entry.paper.table in CURVES:
            assert entry.paper.numbers.get("pgd2000") in final, entry.ref


def test_every_row_passes_plan_at_its_full_world_size(entries, capsys):
    """128 workers of 32 images hold the batch of 4096; Table 3 begins with 48 GPUs, Tables 6 and 7 scale with the batch."""
    statistics = measure_model(load_recipe("imagenet/xie_yuille/base").config)  # networks are built by another test
    at_128, at_own = Counter(), {}
    for entry in (e for e in entries if e.paper.title == TITLE and e.paper.table.startswith(("Table", "Figure"))):
        config = load_recipe(entry.ref).config
        own = config.train.batch_size // IMAGES_A_GPU
        planned = make_plan(config, world_size=own, statistics=statistics).world_size
        at_own.setdefault(entry.paper.table, Counter())[planned] += 1
        if config.train.batch_size % (128 * IMAGES_A_GPU) == 0 or (128 * IMAGES_A_GPU) % config.train.batch_size == 0:
            assert make_plan(config, world_size=128, statistics=statistics).world_size == 128
            at_128[entry.paper.table] += 1
    expected = {table: len(rows) for table, rows in printed().items()} | CURVES
    with capsys.disabled():
        print("\n            printed  pass plan at their own world size  pass it at 128 workers")
        for table, number in sorted(expected.items(), key=lambda item: (item[0].startswith("F"), item[0])):
            print(f"  {table:9} {number:7}  {sum(at_own[table].values()):33}  {at_128[table]:22}")
    assert {table: sum(counts.values()) for table, counts in at_own.items()} == expected
    assert sum(len(rows) for rows in printed().values()) == 113
    assert {table: expected[table] - at_128[table] for table in expected if expected[table] != at_128[table]} == {
        "Table 3": 5  # of 48 GPUs
    }
    tables = sum((counts for table, counts in at_own.items() if table.startswith("Table")), Counter())
    assert tables == {128: 100, 48: 5, 16: 2, 32: 2, 64: 2, 256: 2}
