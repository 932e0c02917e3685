"""What ranks tell each other by doubling distances is what a full exchange would tell, at any world size."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from distributed_at.exchange import first_object, gather_objects, largest
from tests.distributed.launch import run_ranks


def exchanged() -> tuple[list, list, object, list]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    small = gather_objects({"rank": rank})
    # some ranks have messages that need a second part, others do not
    large = gather_objects("x" * (5000 * (rank % 3)) + str(rank))
    first = first_object(("of", rank))
    return small, [len(text) for text in large], first, largest([rank, -rank, 7])


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_every_rank_gets_every_value_in_rank_order(world_size: int) -> None:
    for small, large, first, maxima in run_ranks(exchanged, world_size):
        assert small == [{"rank": r} for r in range(world_size)]
        assert large == [5000 * (r % 3) + 1 for r in range(world_size)]
        assert first == ("of", 0)
        assert maxima == [world_size - 1, 0, 7]


def test_alone_each_value_is_its_own() -> None:
    assert gather_objects("mine") == ["mine"]
    assert first_object("mine") == "mine"
    assert largest([3, -1]) == [3, -1]
