"""What our networks share: pixel normalisation inside the model, stages of blocks, activation checkpointing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distributed_at.config import ModelConfig
from distributed_at.errors import ConfigError
from distributed_at.models.norm import NormFactory
from distributed_at.models.recomputation import recomputation

IMAGE_CHANNELS = 3


class PixelNormalisation(nn.Module):
    """``(x - mean) / std`` per channel, on x (N, 3, H, W) in [0, 1]; its constants are no part of the state dict."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        for field, values in (("pixel_mean", mean), ("pixel_std", std)):
            if len(values) != IMAGE_CHANNELS:
                raise ConfigError(
                    f"model.{field} must hold {IMAGE_CHANNELS} numbers, one a channel, got {list(values)}"
                )
        self.constants = (tuple(mean), tuple(std))
        self.identity = not any(mean) and all(value == 1.0 for value in std)
        self.register_buffer("mean", torch.empty(1, IMAGE_CHANNELS, 1, 1), persistent=False)
        self.register_buffer("std", torch.empty(1, IMAGE_CHANNELS, 1, 1), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Write the constants, also after a network made on the meta device has been given storage."""
        for buffer, values in zip((self.mean, self.std), self.constants, strict=True):
            buffer.copy_(torch.tensor(values, dtype=buffer.dtype, device="cpu").view(1, IMAGE_CHANNELS, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.identity else (x - self.mean) / self.std


class Block(nn.Module):
    """Base of residual blocks: (N, C, H, W) -> (N, expansion * width, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, config: ModelConfig, in_channels: int, width: int, stride: int) -> None:
        super().__init__()


class Network(nn.Module):
    """Base of the classifiers: ``network(x) -> logits``.

    Attributes:
        num_classes: width of the logits.
        activation_checkpointing: recompute each block's activations in the backward pass of a *training* forward. A
            module in ``eval()``, which the attack uses, keeps its activations.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ConfigError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.activation_checkpointing = config.activation_checkpointing
        self.pixels = PixelNormalisation(config.pixel_mean, config.pixel_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes) of images x (N, 3, H, W), float in [0, 1]; pixels are normalised inside."""
        return self.classify(self.pixels(x))

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes) of normalised pixels (N, 3, H, W)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it classifies")

    def run_stage(self, stage: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        """Return x after all blocks of a stage; a training pass may recompute them in its backward pass."""
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block in stage:
            if not recompute:
                x = block(x)
                continue

            def contexts(block: nn.Module = block) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
                return nullcontext(), recomputation(block)

            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x


class StagedNetwork(Network):
    """A network whose stages 'layer1', 'layer2', … each double the width; all but the first halve the image.

    Attributes:
        num_stages: how many there are.
    """

    num_stages = 0

    def add_stages(self, config: ModelConfig, blocks: tuple[int, ...], block_class: type[Block]) -> int:
        """Add ``blocks[i]`` blocks as stage i, behind ``config.base_width`` channels; return the channels after the last."""
        channels = config.base_width
        self.num_stages = len(blocks)
        for stage, count in enumerate(blocks):
            width = config.base_width * 2**stage
            layers = []
            for index in range(count):
                layers.append(block_class(config, channels, width, 2 if stage > 0 and index == 0 else 1))
                channels = width * block_class.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        return channels

    def run_stages(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (N, C, H, W) after all stages."""
        for stage in range(self.num_stages):
            x = self.run_stage(getattr(self, f"layer{stage + 1}"), x)
        return x


class SubsampledConv2d(nn.Conv2d):
    """A strided 1x1 convolution that takes its pixels out first and then convolves at stride 1, which is the same.

    torch 2.14's backward of a strided 1x1 convolution of fewer than 7 channels, laid out channels-last, writes past its
    memory on CPUs without AVX-512; this form does not.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, out_channels, ceil(H / stride), ceil(W / stride)) of (N, in_channels, H, W)."""
        vertical, horizontal = self.stride
        pixels = x[:, :, ::vertical, ::horizontal]
        return nn.functional.conv2d(pixels, self.weight, self.bias, groups=self.groups)


_NARROW = 8  # input channels; from here on torch's own form is safe


def projection(in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> nn.Sequential:
    """Return a strided 1x1 convolution and its norm for a shortcut."""
    return nn.Sequential(conv1x1(in_channels, out_channels, stride), norm(out_channels))


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the image's size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution."""
    conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
    subsample_narrow(conv)
    return conv


def subsample_narrow(network: nn.Module) -> None:
    """Let every narrow strided 1x1 convolution of a network, ours or another's, be a ``SubsampledConv2d``, in place."""
    for layer in network.modules():
        if (
            type(layer) is nn.Conv2d
            and (layer.kernel_size, layer.padding) == ((1, 1), (0, 0))
            and max(layer.stride) > 1
            and layer.in_channels // layer.groups < _NARROW
        ):
            layer.__class__ = SubsampledConv2d


def stem_conv(config: ModelConfig) -> nn.Conv2d:
    """Return the first convolution of a ResNet: 7x7 stride 2 (imagenet) or 3x3 stride 1 (cifar)."""
    if config.stem == "cifar":
        return conv3x3(IMAGE_CHANNELS, config.base_width)
    return nn.Conv2d(IMAGE_CHANNELS, config.base_width, 7, stride=2, padding=3, bias=False)


def stem_pool(config: ModelConfig) -> nn.Module:
    """Return the pooling after the first convolution: 3x3 maximum at stride 2 (imagenet) or none (cifar)."""
    return nn.Identity() if config.stem == "cifar" else nn.MaxPool2d(3, stride=2, padding=1)


def pooled(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over the image, (N, C, H, W) -> (N, C)."""
    return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
