"""Size and cost of a network, measured on the meta device by running it there; no weights, no images, no closed forms."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distributed_at.config import ModelConfig
from distributed_at.logits import checked_logits
from distributed_at.models.base import IMAGE_CHANNELS
from distributed_at.models.dropout import Draw, drawing
from distributed_at.models.registry import build_model

SAMPLES = 2  # a batch of one would hide what does not grow with the batch


@dataclass(frozen=True, kw_only=True)
class ModelStatistics:
    """What ``plan`` needs to know of a network.

    Attributes:
        parameters: learnable numbers.
        buffers: numbers in running statistics (floating point; counters and pixel constants are not counted).
        macs: multiply-accumulates of convolutions and matrix products in one forward of one image.
        activations: numbers that convolutions and linear layers put out for one image.
        train_bytes: bytes that one image keeps for the backward pass of a training forward, float32, every storage once.
        input_grad_bytes: the same for an attack's forward: frozen weights, running statistics, float32.
        image_size: height and width of the image, pixels.
    """

    parameters: int
    buffers: int
    macs: int
    activations: int
    train_bytes: int
    input_grad_bytes: int
    image_size: int


class _Counter:
    """Adds up multiply-accumulates (by torch's own counter) and the outputs of convolutions and linear layers."""

    def __init__(self, model: nn.Module) -> None:
        self.activations = 0
        self._flops = FlopCounterMode(display=False)
        self._handles = [
            layer.register_forward_hook(self._count)
            for layer in model.modules()
            if isinstance(layer, nn.Conv2d | nn.Linear)
        ]

    def _count(self, layer: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        self.activations += output.numel()

    @torch.no_grad()
    def run(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of one counted forward."""
        try:
            with self._flops:
                return model(x)
        finally:
            for handle in self._handles:
                handle.remove()

    @property
    def macs(self) -> int:
        return self._flops.get_total_flops() // 2


@lru_cache(maxsize=256)
def count_macs(config: ModelConfig, *, num_classes: int, image_size: int) -> int:
    """Return multiply-accumulates of one forward of one image: the one number of ``measure`` that comes quickly.

    Raises:
        ConfigError: where the network cannot be built.
    """
    with torch.device("meta"):
        model = build_model(config, num_classes=num_classes, image_size=image_size)
        x = torch.empty(SAMPLES, IMAGE_CHANNELS, image_size, image_size)
    counter = _Counter(model.eval())
    counter.run(model, x)
    return counter.macs // SAMPLES


def _saved_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Return the bytes that autograd keeps for the backward pass of a batch, without weights and buffers."""
    owned = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage  # holding it keeps its address from being given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(x)
    total = sum(storage.nbytes() for storage in kept.values())
    del logits
    return total


def trains_on_one_image(config: ModelConfig, *, num_classes: int, image_size: int) -> bool:
    """Whether every batch norm of the network has more than one value a channel to normalise where it sees one image.

    A norm behind the last pooling has not, nor has one whose maps have shrunk to a single pixel: torch refuses those.
    """
    with torch.device("meta"):
        model = build_model(config, num_classes=num_classes, image_size=image_size)
        x = torch.empty(1, IMAGE_CHANNELS, image_size, image_size)
    draw = Draw(torch.zeros(1, dtype=torch.int64, device="meta"), epoch=0, seed=0)
    try:
        with torch.no_grad(), drawing(model, draw):
            model.train()(x)
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            return False
        raise
    return True


def measure(config: ModelConfig, *, num_classes: int, image_size: int) -> ModelStatistics:
    """Return the size and the cost of a network for images of ``image_size`` pixels a side.

    Raises:
        ConfigError: where the network cannot be built.
    """
    with torch.device("meta"):
        model = build_model(config, num_classes=num_classes, image_size=image_size)
        x = torch.empty(SAMPLES, IMAGE_CHANNELS, image_size, image_size)
    model = model.to(memory_format=torch.channels_last)
    counter = _Counter(model.eval())
    checked_logits(counter.run(model, x), x, num_classes, whose=f"model.arch {config.arch}")
    with drawing(model, Draw(torch.zeros(SAMPLES, dtype=torch.int64, device="meta"), epoch=0, seed=0)):
        train_bytes = _saved_bytes(model.train(), x)
    model.eval().requires_grad_(False)
    input_grad_bytes = _saved_bytes(model, x.requires_grad_())
    running = [b for name, b in model.named_buffers() if name.rsplit(".", 1)[-1] in ("running_mean", "running_var")]
    return ModelStatistics(
        parameters=sum(p.numel() for p in model.parameters()),
        buffers=sum(b.numel() for b in running),
        macs=counter.macs // SAMPLES,
        activations=counter.activations // SAMPLES,
        train_bytes=train_bytes // SAMPLES,
        input_grad_bytes=input_grad_bytes // SAMPLES,
        image_size=image_size,
    )
