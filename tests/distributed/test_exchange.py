"""What ranks tell each other by doubling distances is what a full exchange would tell, at any world size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from distributed_at.engine.processes.launch import free_port, worker_environment
from distributed_at.exchange import first_object, gather_objects, largest
from tests.distributed.launch import run_ranks

ROOT = Path(__file__).parents[2]


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


# Rank 2 of 5 dies when all have made their manager; nobody has used the checkpoints' group for a save yet.
DYING = """
import os, sys, time
import torch
import torch.distributed as dist
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.engine.processes.failures import lost_rank
from distributed_at.engine.processes.world import initialise_world
torch.set_num_threads(1)
initialise_world(timeout_seconds=100.0)
manager = CheckpointManager(sys.argv[1], timeout_seconds=100.0)
dist.barrier()
if dist.get_rank() == 2:
    os._exit(0)
time.sleep(1.0)
begin = time.monotonic()
try:
    lost = bool(manager.save(1, {"w": torch.zeros(3)}, {}).failures)
except RuntimeError as error:
    lost = lost_rank(error)
print(time.monotonic() - begin, lost, flush=True)
os._exit(0)
"""


def test_a_rank_lost_before_the_first_save_is_noticed_at_once(tmp_path: Path) -> None:
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DYING, str(tmp_path / "c")], text=True, stdout=subprocess.PIPE,
            env={**worker_environment(rank, 5, port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(5)
    ]  # fmt: skip
    told = [worker.communicate()[0].split() for worker in started]
    assert told.pop(2) == []
    assert all(lost == "True" for _, lost in told), told
    assert max(float(seconds) for seconds, _ in told) < 50.0, told
