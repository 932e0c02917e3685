"""The network of a finished run: its recipe, one checkpoint's weights, and nothing of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from distributed_at.config import RunConfig
from distributed_at.data.identity import DataIdentity, classes_differ
from distributed_at.data.source import ImageSource, Relabelled
from distributed_at.engine.checkpoint.files import BadCheckpoint, read_manifest
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.engine.checkpoint.state import BUFFER, EMA, MODEL
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.errors import CheckpointError, DataError
from distributed_at.models import build_model

Choice = Literal["auto", "best", "last"]


def find_checkpoint(folder: RunFolder, manager: CheckpointManager, which: str, config: RunConfig) -> Path:
    """Return the checkpoint that ``which`` names: 'auto', 'best', 'last', or a folder under ``checkpoints/``.

    'auto' is what the recipe selects (``train.select``).

    Raises:
        CheckpointError: it does not exist.
    """
    if which == "auto":
        which = "best" if config.train.select == "best_validation" else "last"
    if which == "best":
        best = manager.best()
        if best is None:
            raise CheckpointError(
                f"{folder.root} has no best checkpoint: its recipe says train.select: last; use --checkpoint last"
            )
        return best
    if which == "last":
        last = manager.latest_good()
        if last is None:
            raise CheckpointError(f"{folder.root} has no checkpoint yet; train it first")
        return last
    for candidate in (Path(which), folder.checkpoints / which):
        if candidate.is_dir():
            return candidate
    raise CheckpointError(
        f"no checkpoint {which!r} in {folder.checkpoints}: give 'best', 'last' or a step_XXXXXXXX folder"
    )


@dataclass(frozen=True, kw_only=True)
class SavedNetwork:
    """A network with the weights of one checkpoint, and where that stands in the run."""

    network: nn.Module
    path: Path
    step: int
    epoch: float
    class_names: tuple[str, ...] = ()  # in the order of the logits; empty where the data set has none
    data: Mapping[str, Any] = field(default_factory=dict)  # split -> ``DataIdentity.to_dict`` of the run's own data

    def fitting(self, source: ImageSource) -> ImageSource:
        """Return a source whose labels are the network's: the same one, or by the names of its classes.

        Raises:
            DataError: its classes are others; names the first that differ.
        """
        difference = classes_differ(self.class_names, source.class_names)
        if difference is None:
            return source
        if set(self.class_names) == set(source.class_names):
            return Relabelled(source, self.class_names)
        raise DataError(f"{self.path}: these images are of other classes than its network learned: {difference}")

    def other_data(self, source: ImageSource) -> str | None:
        """Return how a source's data differ from those that the run saw before its first step; None = they do not."""
        own = source.identity()
        held = self.data.get(own.part)
        return None if held is None else DataIdentity.from_dict(held).difference(own)


def open_network(
    folder: RunFolder, config: RunConfig, which: str = "auto", *, num_classes: int | None = None, average: bool = True
) -> SavedNetwork:
    """Return the network of the checkpoint that ``which`` names, on the CPU and in eval mode.

    ``num_classes``: for checkpoints of earlier versions, which do not say it; others need no data to be opened.
    ``average``: use the averaged weights where the recipe keeps them (Gowal et al., section 4.3).

    Raises:
        CheckpointError: it does not exist, or does not fit the recipe.
    """
    manager = CheckpointManager(folder.checkpoints)
    path = find_checkpoint(folder, manager, which, config)
    try:
        metadata = read_manifest(path).metadata
    except BadCheckpoint as bad:
        raise CheckpointError(f"{path}: {bad}") from None
    classes = config.data.num_classes or metadata.get("num_classes") or num_classes
    if classes is None:
        raise CheckpointError(f"{path} does not say how many classes its network has: give data.num_classes")
    network = load_network(config, manager, path, num_classes=int(classes), average=average)
    return SavedNetwork(
        network=network,
        path=path,
        step=int(metadata.get("step", 0)),
        epoch=float(metadata.get("epoch", 0.0)),
        class_names=tuple(metadata.get("class_names", ())),
        data=metadata.get("data", {}),
    )


def load_network(
    config: RunConfig, manager: CheckpointManager, path: Path, *, num_classes: int, average: bool = True
) -> nn.Module:
    """Return the network with a checkpoint's weights, on the CPU and in eval mode.

    ``average``: use the averaged weights where the recipe keeps them (Gowal et al., section 4.3).
    """
    with torch.random.fork_rng(devices=[]):  # what it draws is written over; the caller's generator stays where it was
        image_size = read_manifest(path).metadata.get("image_size")
        module = build_model(config.model, num_classes=num_classes, image_size=image_size)
    averaged = average and config.train.ema is not None
    names = set(dict(module.named_parameters()))
    if averaged and config.train.ema is not None and config.train.ema.buffers == "average":
        names |= {n for n, b in module.named_buffers() if b.is_floating_point()}
    persistent = module.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in persistent.items():
        if name in dict(module.named_parameters()) or name in names:
            tensors[(EMA if averaged and name in names else MODEL) + name] = tensor
        else:
            tensors[BUFFER + name] = tensor
    manager.load(path, tensors)
    module.load_state_dict(persistent)
    return module.eval()
