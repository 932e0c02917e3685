"""The check of all ranks together finds what differs between them and names the rank."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from distributed_at.engine.processes import preflight
from distributed_at.engine.processes.world import initialise_world
from distributed_at.findings import BROKEN, OK, SLOW
from tests.distributed.launch import run_ranks


def _examine(folder: str) -> dict[str, dict[str, tuple[str, str]]]:
    """Examine two ranks as they are, and with one thing wrong on rank 1 at a time."""
    world = initialise_world(60.0)
    odd = world.rank == 1

    def look(recipe: str = "lr: 0.1") -> dict[str, tuple[str, str]]:
        found = preflight.examine_ranks(world, Path(folder), recipe=recipe, megabytes=2)
        return {f.part: (f.state, f.detail) for f in found}

    results = {"sound": look(), "recipe": look("lr: 0.2" if odd else "lr: 0.1")}
    real = time.time
    with mock.patch.object(preflight.time, "time", side_effect=lambda: real() + (30 if odd else 0)):
        results["clock"] = look()
    with mock.patch.object(preflight, "_versions", return_value={"torch": "1.0" if odd else "2.0"}):
        results["versions"] = look()
    blind = mock.patch.object(preflight, "VISIBLE_WITHIN", 0.2)
    with blind, mock.patch.object(preflight, "_size", return_value=None) if odd else nullcontext():
        results["files"] = look()
    dist.barrier()
    return results


def test_differences_between_ranks_are_named(tmp_path):
    first, second = run_ranks(_examine, 2, str(tmp_path))
    assert first.keys() == second.keys()
    sound = first["sound"]
    assert {part: state for part, (state, _) in sound.items() if part not in ("space", "compute")} == dict.fromkeys(
        ("devices", "all-reduce", "clocks", "open files", "files", "versions", "code", "recipe"), OK
    )
    assert first["recipe"]["recipe"][0] == BROKEN
    assert "rank 1 on" in first["recipe"]["recipe"][1]
    assert first["clock"]["clocks"][0] == SLOW
    assert "30.0 s: rank 1 on" in first["clock"]["clocks"][1]
    assert first["versions"]["versions"][0] == BROKEN
    assert "1.0" in first["versions"]["versions"][1]
    assert first["files"]["files"][0] == BROKEN
    assert "rank 1 on" in first["files"]["files"][1]
    assert not list(Path(tmp_path).glob(".preflight-*"))
