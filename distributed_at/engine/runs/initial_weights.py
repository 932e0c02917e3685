"""The weights that a run begins with where its recipe says ``train.init_from``: another run's, or a file's.

Weights and BN statistics alone: no optimiser, no step number, and nothing in the file is executed. A run that already
has a checkpoint goes on from that and never looks here again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distributed_at.config import RunConfig
from distributed_at.engine.checkpoint import files
from distributed_at.engine.checkpoint.retention import read_best
from distributed_at.engine.checkpoint.tools import read_weights
from distributed_at.engine.parallel import World
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.errors import CheckpointError, ConfigError, UserError
from distributed_at.models.parameters import load_torchvision_state_dict


def check_initial_weights(config: RunConfig) -> None:
    """Refuse what can be known to fail before any worker starts.

    Raises:
        ConfigError: BN-only finetuning without a network to finetune, or a path that does not exist.
    """
    source = config.train.init_from
    if source is None:
        if config.train.bn_only is not None:
            raise ConfigError(
                "train.bn_only finetunes the batch norms of a finished network: give train.init_from=RUN, a run folder "
                "or a weights file (init=RUN also takes that run's model and data)"
            )
        return
    if not Path(source).expanduser().exists():
        raise ConfigError(f"train.init_from: there is no {source}: give a run folder, a checkpoint or a weights file")


def read_initial_weights(source: str) -> dict[str, torch.Tensor]:
    """Return the state dict of ``train.init_from`` in host memory.

    A run gives what its evaluation would take: the checkpoint that ``train.select`` prefers, the averaged weights
    where the run keeps them. A checkpoint folder gives its weights, a file (.safetensors, .pt, .pth) its state dict.

    Raises:
        CheckpointError: nothing usable there, or numbers that are not finite.
        ConfigError: a file of another kind.
    """
    path = Path(source).expanduser()
    if (path / "recipe.yaml").exists():
        held = RunFolder(path).load_config()
        best = read_best(path / "checkpoints") if held.train.select == "best_validation" else None
        state = read_weights(best or path, weights="ema" if held.train.ema is not None else "model")
    else:
        state = read_weights(path)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"train.init_from {source}: {name} holds numbers that are not finite")
    return state


def apply_initial_weights(module: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Copy a state dict into the network; every name and shape must agree, and nothing is copied where one does not.

    A network with plain batch norm may start one with mixture batch norm: both halves get its one set.

    Raises:
        ConfigError: the weights belong to another network; names the first differences.
    """
    try:
        load_torchvision_state_dict(module, state)
    except ConfigError as error:
        raise ConfigError(
            f"train.init_from {source}: {error}. Is model (and data.num_classes) that of {source}?"
        ) from None


def begin_from(module: nn.Module, config: RunConfig, world: World, folder: RunFolder) -> dict[str, Any] | None:
    """Give a new run's network (on the CPU) its initial weights; return what to record of them.

    None where the recipe names none, or where the run's folder already holds checkpoints to go on from. Collective:
    rank 0 reads, every rank gets the same bits, and a refusal is raised on all of them.
    """
    source = config.train.init_from
    if source is None:
        return None
    return read_into(module, source, world, folder, check=lambda: check_initial_weights(config))


def read_into(
    module: nn.Module, source: str, world: World, folder: RunFolder, *, check: Callable[[], None] = lambda: None
) -> dict[str, Any] | None:
    """Give a network (on the CPU) the weights of a run or file on all ranks; return what to record of them.

    None, with nothing read, where the run's folder already holds checkpoints, in which the network is saved too.
    """
    told: list[Any] = [None, None]
    if world.is_main:
        try:
            begins = not (files.list_steps(folder.checkpoints) or files.half_replaced(folder.checkpoints))
            if begins:
                check()
                apply_initial_weights(module, read_initial_weights(source), source)
            told = [begins, None]
        except UserError as error:
            told = [None, error]
    if world.world_size > 1:
        dist.broadcast_object_list(told, src=0, group=world.control)
    begins, refusal = told
    if refusal is not None:
        raise refusal
    if not begins:
        return None
    if world.world_size > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0, group=world.control)
    return {"source": source, "sha256": _digest(module)}


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
