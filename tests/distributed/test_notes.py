"""What a data source of any rank has to say reaches rank 0, which alone has the event log."""

from __future__ import annotations

import torch
import torch.distributed as dist

from distributed_at.engine.processes.notes import MOST, Notes
from distributed_at.engine.processes.world import World
from tests.distributed.launch import run_ranks


def collected() -> list[list[tuple[str, str]]]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world, notes = World(rank, 2, rank, torch.device("cpu")), Notes()
    notes.add("image_damaged", "seen by both")
    if rank == 1:
        for number in range(MOST):
            notes.add("image_damaged", f"image {number}")
    return [notes.collect(world), notes.collect(world)]


def test_notes_of_all_ranks_are_told_once_and_the_newest_are_kept():
    first, second = run_ranks(collected, 2)
    assert first == second
    assert first[0] == [("image_damaged", text) for text in ("seen by both", *(f"image {n}" for n in range(MOST)))]
    assert first[1] == []
