"""A finished run, read back by hand: which weights its checkpoints hold, and what a network with them answers."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from distributed_at.cli import main
from distributed_at.engine.checkpoint.tools import read_checkpoint
from distributed_at.models import build_model
from distributed_at.recipes import load_recipe
from tests.training_kit import one_world

State = dict[str, torch.Tensor]


def weights_in(folder: Path, step: int, *, averaged: bool, buffers_averaged: bool = False) -> State:
    """Return parameters and BN statistics of a checkpoint under the network's own names."""
    tensors, _ = read_checkpoint(folder / "checkpoints" / f"step_{step:08d}")
    state = {name.removeprefix("buffer."): t for name, t in tensors.items() if name.startswith("buffer.")}
    kind = "ema." if averaged else "model."
    parameters = [name.removeprefix("model.") for name in tensors if name.startswith("model.")]
    state.update({name: tensors[kind + name] for name in parameters})
    if averaged and buffers_averaged:
        state.update({name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")})
    return state


def fingerprint(state: State) -> str:
    """sha256 of names, types, shapes and bytes, in the order of names; counts of batches left out."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if name.rsplit(".", 1)[-1] == "num_batches_tracked":
            continue
        array = tensor.detach().numpy()
        digest.update(f"{name}|torch.{array.dtype}|{array.shape}|".encode() + array.tobytes())
    return digest.hexdigest()


def network_with(folder: Path, state: State) -> nn.Module:
    """Return the run's network in eval mode with these weights and no others."""
    config = load_recipe(str(folder / "recipe.yaml"), []).config
    network = build_model(config.model, num_classes=10)
    missing, foreign = network.load_state_dict(state, strict=False)
    assert not foreign
    assert all(name.endswith("num_batches_tracked") for name in missing)
    return network.eval()


def answers(network: nn.Module, images: torch.Tensor) -> np.ndarray:
    """(N,) classes of float images (N, C, H, W)."""
    with torch.no_grad():
        return network(images).argmax(1).numpy()


def say(*words: Any) -> dict[str, Any]:
    """Give a command in this process, as a worker would, and return the JSON that it prints."""
    with (
        mock.patch.dict(os.environ, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0"),
        one_world(),
        mock.patch("sys.stdout") as out,
    ):
        assert main([*map(str, words), "--json"]) == 0
    return json.loads("".join(call.args[0] for call in out.write.call_args_list))


def protocol_of(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Return the protocol that a row of a table was measured by, as its folder holds it."""
    (found,) = (
        content
        for path in folder.glob("evaluations/*/protocol.json")
        if (content := json.loads(path.read_text()))["hash"] == row["hash"]
    )
    return found
