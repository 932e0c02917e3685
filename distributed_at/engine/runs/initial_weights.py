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

from distributed_at.catalogue.networks import library_of
from distributed_at.config import ModelConfig, RunConfig
from distributed_at.data.identity import classes_differ
from distributed_at.engine.checkpoint import files
from distributed_at.engine.checkpoint.retention import read_best
from distributed_at.engine.checkpoint.tools import read_weights
from distributed_at.engine.checkpoint.weight_files import naming_hint, read_weight_file
from distributed_at.engine.processes.world import World, from_main
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.errors import BadCheckpoint, CheckpointError, ConfigError, UserError
from distributed_at.models.foreign import fitted_weights, published_weights
from distributed_at.models.parameters import load_torchvision_state_dict


def check_initial_weights(config: RunConfig) -> None:
    """Refuse what can be known to fail before any worker starts.

    Raises:
        ConfigError: BN-only finetuning without a network to finetune, or a path that does not exist.
    """
    source = config.train.init_from
    if source is not None and config.model.pretrained is not None:
        raise ConfigError(
            f"train.init_from {source} and model.pretrained {config.model.pretrained} are two beginnings: give one"
        )
    if source is None:
        if config.train.bn_only is not None:
            raise ConfigError(
                "train.bn_only finetunes the batch norms of a finished network: give train.init_from=RUN, a run folder "
                "or a weights file (init=RUN also takes that run's model and data)"
            )
        return
    if not Path(source).expanduser().exists():
        raise ConfigError(f"train.init_from: there is no {source}: give a run folder, a checkpoint or a weights file")


def read_initial_weights(
    source: str,
    *,
    field: str = "train.init_from",
    model: ModelConfig | None = None,
    own: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Return the state dict of ``train.init_from`` (or of another ``field``) in host memory.

    ``model``: its pixel normalisation must be the one that came with a file's weights. ``own``: the network's state dict,
    by whose names the form of a wrapped file's is chosen.

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
    elif path.is_file():
        file = read_weight_file(path)
        if model is not None:
            file.check_normaliser(model.pixel_mean, model.pixel_std, source=f"{field} {source}")
        state = file.state if own is None else file.fitting(own)
    else:
        state = read_weights(path)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{field} {source}: {name} holds numbers that are not finite")
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
            f"train.init_from {source}: {error}.{naming_hint(state, module.state_dict())} "
            f"Is model (and data.num_classes) that of {source}?"
        ) from None


def begin_from(
    module: nn.Module, config: RunConfig, world: World, folder: RunFolder, *, class_names: tuple[str, ...] = ()
) -> dict[str, Any] | None:
    """Give a new run's network (on the CPU) its initial weights; return what to record of them.

    ``class_names``: of the data, in the order of labels; weights of ``train.init_from`` that know theirs must agree.

    None where the recipe names none, or where the run's folder already holds checkpoints to go on from. Collective:
    rank 0 reads, every rank gets the same bits, and a refusal is raised on all of them.
    """
    source, pretrained = config.train.init_from, config.model.pretrained
    if source is None and pretrained is None:
        return None

    def apply() -> dict[str, Any]:
        check_initial_weights(config)
        if source is not None:
            _check_classes(source, class_names)
            apply_initial_weights(
                module, read_initial_weights(source, model=config.model, own=module.state_dict()), source
            )
            return {"source": source}
        assert pretrained is not None
        return {"source": pretrained, "dropped": apply_pretrained(module, config)}

    return _read_once(module, world, folder, apply)


def _check_classes(source: str, names: tuple[str, ...]) -> None:
    """Refuse a run whose head tells other classes apart, or the same ones in another order."""
    step: Path | None = Path(source).expanduser()
    if (Path(source).expanduser() / "recipe.yaml").exists():
        held = RunFolder(Path(source).expanduser())
        best = read_best(held.checkpoints) if held.load_config().train.select == "best_validation" else None
        steps = files.list_steps(held.checkpoints)
        step = best or (steps[0][1] if steps else None)
    try:
        known = files.read_manifest(step).metadata.get("class_names", ()) if step and step.is_dir() else ()
    except BadCheckpoint:  # told by what reads its weights
        return
    difference = classes_differ(tuple(known), names)
    if difference is not None:
        raise ConfigError(
            f"train.init_from {source}: these data are of other classes than its network learned: {difference}. "
            "Give the classes the names and order that they had"
        )


def apply_pretrained(module: nn.Module, config: RunConfig) -> list[str]:
    """Copy the weights of ``model.pretrained`` into the network; return the tensors that its new head did not take.

    Raises:
        ConfigError: they belong to another network, or cannot be found.
        CheckpointError: numbers that are not finite.
    """
    source = str(config.model.pretrained)
    if Path(source).expanduser().exists():
        state: Mapping[str, torch.Tensor] = read_initial_weights(
            source, field="model.pretrained", model=config.model, own=module.state_dict()
        )
    elif library_of(config.model.arch) is not None:
        state = published_weights(config.model, image_size=config.data.image_size)
    else:
        raise ConfigError(f"model.pretrained: there is no {source}: give a run folder, a checkpoint or a weights file")
    fitted, dropped = fitted_weights(module, state)
    try:
        load_torchvision_state_dict(module, fitted)
    except ConfigError as error:
        raise ConfigError(f"model.pretrained {source}: {error}.{naming_hint(fitted, module.state_dict())}") from None
    return dropped


def read_into(module: nn.Module, source: str, world: World, folder: RunFolder) -> dict[str, Any] | None:
    """Give a network (on the CPU) the weights of a run or file on all ranks; return what to record of them.

    None, with nothing read, where the run's folder already holds checkpoints, in which the network is saved too.
    """

    def apply() -> dict[str, Any]:
        apply_initial_weights(module, read_initial_weights(source, own=module.state_dict()), source)
        return {"source": source}

    return _read_once(module, world, folder, apply)


def _read_once(
    module: nn.Module, world: World, folder: RunFolder, apply: Callable[[], dict[str, Any]]
) -> dict[str, Any] | None:
    """Let rank 0 change the network by ``apply`` and give every rank its bits; refusals are raised on all ranks."""
    told: tuple[dict[str, Any] | None, UserError | None] = (None, None)
    if world.is_main:
        try:
            begins = not (files.list_steps(folder.checkpoints) or files.half_replaced(folder.checkpoints))
            told = (apply() if begins else None, None)
        except UserError as error:
            told = (None, error)
    record, refusal = from_main(told, world)
    if refusal is not None:
        raise refusal
    if record is None:
        return None
    if world.world_size > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0, group=world.control)
    return {**record, "sha256": _digest(module)}


def _digest(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
