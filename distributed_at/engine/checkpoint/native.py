"""Reads DeepSpeed's own ZeRO 1/2 checkpoints, written on any number of ranks. They are pickles: for trusted files alone."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from distributed_at.engine.checkpoint.state import BUFFER, MODEL, OPTIMIZER
from distributed_at.errors import CheckpointError

_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$")


def read_native(folder: Path) -> dict[str, torch.Tensor]:
    """Return fp32 weights, optimiser state and buffers by our names. Opening the files can run code that is in them."""
    shards = sorted(
        ((int(match[1]), path) for path in folder.glob("*optim_states.pt") if (match := _SHARD.search(path.name))),
    )
    model = _open(folder / "mp_rank_00_model_states.pt")
    shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
    tensors = {BUFFER + name: model["module"][name].clone() for name in model.get("buffer_names", ())}
    pieces: dict[str, list[torch.Tensor]] = {}
    for rank, path in shards:
        state = _open(path)["optimizer_state_dict"]
        if "single_partition_of_fp32_groups" not in state:
            raise CheckpointError(f"{path} is not of ZeRO stage 1 or 2")
        if state["partition_count"][0] != len(shards) or rank >= len(shards):
            raise CheckpointError(
                f"{folder} was written by {state['partition_count'][0]} ranks; {len(shards)} files are here"
            )
        inner = state["base_optimizer_state"]
        for index, mapping in enumerate(state["param_slice_mappings"]):
            key = inner["param_groups"][index]["params"][0]
            flats, scalars = _group(state["single_partition_of_fp32_groups"][index], inner["state"].get(key, {}))
            for name, address in mapping.items():
                for kind, flat in flats.items():
                    part = flat[address.start : address.start + address.numel]
                    pieces.setdefault(_name(kind, name), []).append(part)
                for kind, value in scalars.items():
                    tensors[_name(kind, name)] = value.clone()
    for name, parts in pieces.items():
        shape = shapes[name.removeprefix(MODEL) if name.startswith(MODEL) else name.split(".", 2)[2]]
        if sum(part.numel() for part in parts) != math.prod(shape):
            raise CheckpointError(f"{folder}: the shards hold only a part of {name}")
        tensors[name] = torch.cat(parts).view(shape)
    for name, value in model["module"].items():  # what no optimiser holds: frozen parameters
        if name not in shapes and BUFFER + name not in tensors:
            tensors[MODEL + name] = value.detach().clone()
    return tensors


def _name(kind: str, name: str) -> str:
    return MODEL + name if kind == "fp32" else f"{OPTIMIZER}{kind}.{name}"


def _group(flat: torch.Tensor, state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split a partition's state into one value per weight and single numbers."""
    tensors = {kind: value for kind, value in state.items() if isinstance(value, torch.Tensor)}
    vectors = {kind: value for kind, value in tensors.items() if value.ndim == 1}
    return {"fp32": flat.detach(), **vectors}, {kind: value for kind, value in tensors.items() if value.ndim == 0}


def _open(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (OSError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
