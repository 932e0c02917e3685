"""What one rank costs does not grow with the world, or by what is stated: counted in real runs, not timed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from distributed_at.engine.processes.open_files import files_needed
from tests.distributed.counting import counted

SMALL = (2, 4, 8)
LISTENING = 8  # sockets of a rank on which others come in, at whatever world size
# Writes that one more rank costs each rank: a ring of gloo's makes two messages for each, and so many rings a part has.
# Everything else is sent to ranks at distances 1, 2, 4, ….
RINGS = {
    "first look": 1,
    "step": 11,  # ZeRO's gradients, weights and norm, running statistics: NCCL's on GPUs
    "log row": 2,  # the sums of the meters: NCCL's on GPUs
    "save": 12,  # torch's own agreement on what each rank writes
    "resume": 1,  # what all ranks hold alike is read in shares and brought together
    "evaluation": 45,  # agreements, rows that are known and new ones; the store at which a new group meets
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    return {size: counted(tmp_path_factory.mktemp("counted") / str(size), size) for size in SMALL}


def numbers(found: dict[int, dict[str, Any]], part: str, kind: str) -> dict[int, list[int]]:
    return {size: counts["parts"][part][kind] for size, counts in found.items()}


def test_no_rank_opens_or_lists_more_in_a_larger_world(found: dict[int, dict[str, Any]]) -> None:
    for part in RINGS:
        for kind in ("opened", "listed"):
            seen = numbers(found, part, kind)
            assert len({(each[0], max(each[1:])) for each in seen.values()}) == 1, (part, kind, seen)
            assert kind == "opened" or not any(max(each[1:]) for each in seen.values()), "rank 0 alone lists a folder"
    tries = numbers(found, "first look", "opened").values()
    assert not any(max(each[1:]) for each in tries), "of one node's ranks one alone tries the disk"


def test_messages_grow_by_gloos_rings_alone(found: dict[int, dict[str, Any]]) -> None:
    for part, rings in RINGS.items():
        seen = numbers(found, part, "writes")
        for small, large in ((2, 4), (4, 8)):
            allowed = 2 * rings * (large - small) + 60 * math.log2(large / small)
            assert max(seen[large]) - max(seen[small]) <= allowed, (part, seen)


def test_sockets_are_those_of_the_formula(found: dict[int, dict[str, Any]]) -> None:
    none = files_needed(1, "cpu")
    for part in RINGS:
        for size, sockets in numbers(found, part, "sockets").items():
            for rank, count in enumerate(sockets):
                assert count <= files_needed(size, "cpu", rank=rank) - none + LISTENING, (part, size, sockets)
            assert max(sockets[1:]) <= 8 * math.ceil(math.log2(size)) + LISTENING, (part, size, sockets)


def test_sockets_grow_with_the_logarithm(found: dict[int, dict[str, Any]]) -> None:
    """Two more neighbours in each of at most four groups for twice the ranks; all pairs would add four in each."""
    for part in RINGS:
        sockets = numbers(found, part, "sockets")
        assert max(sockets[8][1:]) - max(sockets[4][1:]) <= 8, (part, sockets)


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 32])
def test_many_ranks_train_save_resume_and_evaluate_under_a_low_limit(tmp_path: Path, size: int) -> None:
    many = {2: counted(tmp_path / "2", 2), size: counted(tmp_path / str(size), size, limit=256)}
    test_no_rank_opens_or_lists_more_in_a_larger_world(many)
    test_sockets_are_those_of_the_formula(many)
    assert many[size]["exit codes"] == {"train": [85] * size, "resume": [0] * size, "eval": [0] * size}
