"""The sweep's map and its reasons are true of the sources as they are; the sweep itself is ``make mutate``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.mutation import PACKAGE, ROOT
from tests.mutations.numbers import FILES
from tests.mutations.sweep import _annotations, _sample
from tests.mutations.sweep_table import Counts, Survivor, reason_for, reasons, survivor, table


@pytest.mark.parametrize("file", FILES)
def test_every_file_and_every_test_named_for_it_exists(file: str) -> None:
    assert (ROOT / PACKAGE / file).is_file()
    for test in FILES[file]:
        path, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / path).read_text()


def test_every_reason_is_about_a_line_that_still_stands() -> None:
    for entry in reasons():
        assert entry["why"], entry
        assert entry["file"] in FILES, entry
        lines = " ".join(line.strip() for line in (ROOT / PACKAGE / entry["file"]).read_text().splitlines())
        assert entry["old"] in lines, entry


class Item:
    """A work item as far as the sample looks at it."""

    def __init__(self, start: tuple[int, int], operator: str) -> None:
        self.start_pos, self.end_pos = start, (start[0], start[1] + 1)
        self.operator_name, self.occurrence, self.mutations = operator, 0, (self,)
        self.job_id = f"{start} {operator}"


def test_the_sample_takes_one_mutant_of_each_drawn_place_and_always_the_same() -> None:
    items = tuple(Item((row, 0), operator) for row in range(1, 41) for operator in "abc")
    real, drawn = _sample(items, "", "0 rng.py", 0.5)
    assert len(real) == 120
    assert len(drawn) == len({job.split(")")[0] for job in drawn}) == 20
    assert _sample(items[::-1], "", "0 rng.py", 0.5) == (real, drawn)
    assert _sample(items, "", "1 rng.py", 0.5)[1] != drawn


def test_mutants_inside_annotations_are_none() -> None:
    source = "def f(a: int | None = 1 | 2) -> int | None:\n    b: int | None = a | 3\n"
    spans = _annotations(source)
    bars = [
        (row, column) for row, line in enumerate(source.splitlines(), 1) for column, c in enumerate(line) if c == "|"
    ]
    inside = [any(start <= bar < end for start, end in spans) for bar in bars]
    assert inside == [True, False, True, True, False]


def test_a_survivor_without_a_reason_is_counted_and_shown() -> None:
    diff = "--- mutation diff ---\n--- a/x\n+++ b/x\n@@ -1 +1 @@\n context\n-    a = b | c\n+    a = b & c\n"
    found = survivor(str(Path(PACKAGE) / "rng.py"), 7, "core/ReplaceBinaryOperator_BitOr_BitAnd", diff)
    assert found == Survivor("rng.py", 7, "ReplaceBinaryOperator_BitOr_BitAnd", "a = b | c", "a = b & c")
    text, unexplained = table(
        {"rng.py": (Counts(undrawn=3, killed=2, survived=1), [found])}, tool="t", share=0.2, seed=0
    )
    assert unexplained == 1
    assert "| `rng.py` | 6 | 3 | 2 | 1 | 0 | 0 |" in text
    assert "| rng.py:7 | `a = b \\| c` | `a = b & c` | **no reason yet** |" in text


def test_a_reason_is_for_one_change_or_for_all_of_a_line() -> None:
    found = Survivor("rng.py", 7, "x", "a = b", "a = c")
    one = {"file": "rng.py", "old": "a = b", "new": "a = c", "why": "one"}
    assert reason_for(found, [{**one, "new": "a = d"}, one]) == "one"
    assert reason_for(found, [{k: v for k, v in one.items() if k != "new"}]) == "one"
    assert reason_for(found, [{**one, "file": "other.py"}, {**one, "old": "a = e"}]) == ""
