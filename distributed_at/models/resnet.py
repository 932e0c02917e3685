"""Post-activation ResNets (He et al. 2016a; stride on the 3x3 convolution), with torchvision's parameter names.

Depths beyond 152: R-200 as in He et al. 2016b, and 338/518/638 of Xie & Yuille 2020, whose layouts were never
published; here they keep R-200's ratio of 2:3 between stages two and three.
"""

from __future__ import annotations

import torch
from torch import nn

from distributed_at.config import ModelConfig
from distributed_at.models.activations import build_activation
from distributed_at.models.base import Block, StagedNetwork, conv1x1, conv3x3, pooled, projection, stem_conv, stem_pool
from distributed_at.models.norm import norm_factory


class BasicBlock(Block):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, config: ModelConfig, in_channels: int, width: int, stride: int) -> None:
        super().__init__(config, in_channels, width, stride)
        norm = norm_factory(config)
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = norm(width)
        self.activation = build_activation(config)
        self.downsample = projection(in_channels, width, stride, norm) if stride != 1 or in_channels != width else None

    @property
    def last_norm(self) -> nn.Module:
        """The norm that ends the residual branch."""
        return self.bn2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, width, H / stride, W / stride)."""
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.activation(out + shortcut)


class Bottleneck(Block):
    """1x1, 3x3 (strided) and 1x1 convolutions and a shortcut; its output has four times its width."""

    expansion = 4

    def __init__(self, config: ModelConfig, in_channels: int, width: int, stride: int) -> None:
        super().__init__(config, in_channels, width, stride)
        norm = norm_factory(config)
        out_channels = width * self.expansion
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = norm(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = norm(width)
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = norm(out_channels)
        self.activation = build_activation(config)
        self.downsample = (
            projection(in_channels, out_channels, stride, norm) if stride != 1 or in_channels != out_channels else None
        )

    @property
    def last_norm(self) -> nn.Module:
        """The norm that ends the residual branch."""
        return self.bn3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, 4 * width, H / stride, W / stride)."""
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.activation(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.activation(out + shortcut)


BLOCKS: dict[str, type[Block]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(StagedNetwork):
    """A ResNet of any block list; stage i is 2^i times as wide as the first, and all but the first halve the image.

    Args:
        config: stem, base_width, norm, activation and checkpointing; its arch and blocks are not read here.
        num_classes: width of the logits.
        blocks: blocks per stage, e.g. (3, 4, 6, 3).
        block: 'basic' or 'bottleneck'.
    """

    def __init__(self, config: ModelConfig, *, num_classes: int, blocks: tuple[int, ...], block: str) -> None:
        super().__init__(config, num_classes)
        self.conv1 = stem_conv(config)
        self.bn1 = norm_factory(config)(config.base_width)
        self.activation = build_activation(config)
        self.maxpool = stem_pool(config)
        channels = self.add_stages(config, blocks, BLOCKS[block])
        self.fc = nn.Linear(channels, num_classes)

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes) of normalised pixels (N, 3, H, W)."""
        x = self.maxpool(self.activation(self.bn1(self.conv1(x))))
        return self.fc(pooled(self.run_stages(x)))
