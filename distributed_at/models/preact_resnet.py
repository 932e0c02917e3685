"""Pre-activation ResNets (He et al. 2016b) in the layout of Bag of tricks for adversarial training (Pang et al. 2021).

That paper calls PreActResNet-18 with the CIFAR stem "ResNet-18". Shortcut convolutions have no norm; a last norm and
activation stand before the pooling. Parameter names are those of the common CIFAR implementations.
"""

from __future__ import annotations

import torch
from torch import nn

from distributed_at.config import ModelConfig
from distributed_at.models.activations import build_activation
from distributed_at.models.base import Block, StagedNetwork, conv1x1, conv3x3, pooled, stem_conv, stem_pool
from distributed_at.models.norm import norm_factory


class PreActBlock(Block):
    """Norm, activation and 3x3 convolution, twice; the shortcut's convolution takes the activated or the raw input."""

    def __init__(self, config: ModelConfig, in_channels: int, width: int, stride: int) -> None:
        super().__init__(config, in_channels, width, stride)
        norm = norm_factory(config)
        self.activated_shortcut = config.preact_shortcut == "activated"
        self.bn1 = norm(in_channels)
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn2 = norm(width)
        self.conv2 = conv3x3(width, width)
        self.activation = build_activation(config)
        self.shortcut = (
            nn.Sequential(conv1x1(in_channels, width, stride)) if stride != 1 or in_channels != width else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, width, H / stride, W / stride)."""
        out = self.activation(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out if self.activated_shortcut else x)
        out = self.conv1(out)
        out = self.conv2(self.activation(self.bn2(out)))
        return out + shortcut


class PreActBottleneck(Block):
    """Norm, activation and convolution, three times (1x1, strided 3x3, 1x1); the output has four times the width."""

    expansion = 4

    def __init__(self, config: ModelConfig, in_channels: int, width: int, stride: int) -> None:
        super().__init__(config, in_channels, width, stride)
        norm = norm_factory(config)
        out_channels = width * self.expansion
        self.activated_shortcut = config.preact_shortcut == "activated"
        self.bn1 = norm(in_channels)
        self.conv1 = conv1x1(in_channels, width)
        self.bn2 = norm(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn3 = norm(width)
        self.conv3 = conv1x1(width, out_channels)
        self.activation = build_activation(config)
        self.shortcut = (
            nn.Sequential(conv1x1(in_channels, out_channels, stride))
            if stride != 1 or in_channels != out_channels
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, 4 * width, H / stride, W / stride)."""
        out = self.activation(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out if self.activated_shortcut else x)
        out = self.conv1(out)
        out = self.conv2(self.activation(self.bn2(out)))
        out = self.conv3(self.activation(self.bn3(out)))
        return out + shortcut


BLOCKS: dict[str, type[Block]] = {"basic": PreActBlock, "bottleneck": PreActBottleneck}


class PreActResNet(StagedNetwork):
    """A pre-activation ResNet of any block list; stage i is 2^i times as wide as the first.

    With the ImageNet stem the first convolution is pooled without norm or activation, since each block brings its own.

    Args:
        config: stem, base_width, norm, activation, preact_shortcut; its arch and blocks are not read here.
        num_classes: width of the logits.
        blocks: blocks per stage, e.g. (2, 2, 2, 2).
        block: 'basic' or 'bottleneck'.
    """

    def __init__(self, config: ModelConfig, *, num_classes: int, blocks: tuple[int, ...], block: str) -> None:
        super().__init__(config, num_classes)
        self.conv1 = stem_conv(config)
        self.maxpool = stem_pool(config)
        channels = self.add_stages(config, blocks, BLOCKS[block])
        self.bn = norm_factory(config)(channels)
        self.activation = build_activation(config)
        self.linear = nn.Linear(channels, num_classes)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes) of normalised pixels (N, 3, H, W)."""
        x = self.run_stages(self.maxpool(self.conv1(x)))
        return self.linear(pooled(self.activation(self.bn(x))))
