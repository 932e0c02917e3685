"""A run that begins from a file begins from the same bits on every rank, statistics too."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from distributed_at.engine.builder import build_network
from distributed_at.engine.processes.world import initialise_world
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.engine.runs.initial_weights import begin_from
from distributed_at.errors import UserError
from distributed_at.recipes import load_recipe
from tests.distributed.launch import run_ranks
from tests.training_kit import RECIPE, TINY


def digest(state: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def begin(file: str, folder: str) -> tuple[str, str, str]:
    """Begin this rank's network, which was made from another seed than the file's and the other rank's."""
    world = initialise_world()
    config = load_recipe(str(RECIPE), [*TINY, f"train.init_from={file}", f"seed={1 + world.rank}"]).config
    network = build_network(config, 10)
    told = begin_from(network, config, world, RunFolder(Path(folder)))
    other = load_recipe(str(RECIPE), [*TINY, f"train.init_from={file}", "model.base_width=8"]).config
    try:
        begin_from(build_network(other, 10), other, world, RunFolder(Path(folder)))
        refused = ""
    except UserError as error:
        refused = str(error)
    return digest(network.state_dict()), told["sha256"], refused


def test_every_rank_begins_with_the_files_bits_and_all_refuse_together(tmp_path):
    network = build_network(load_recipe(str(RECIPE), TINY).config, 10)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.add_(3)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    first, second = run_ranks(begin, 2, str(tmp_path / "weights.pt"), str(tmp_path / "run"))
    assert first[0] == second[0] == digest(network.state_dict())
    assert first[1] == second[1]
    assert "train.init_from" in first[2]
    assert first[2] == second[2]
