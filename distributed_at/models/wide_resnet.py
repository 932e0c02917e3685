"""Wide residual networks WRN-depth-widen (Zagoruyko & Komodakis 2016) for images of about 32 pixels.

Pre-activation, projection shortcuts on the activated input. Parameter names are those under which robust WideResNets
are commonly published; the block that some of those codes declare and never use does not exist here.
"""

from __future__ import annotations

import torch
from torch import nn

from distributed_at.config import ModelConfig
from distributed_at.models.activations import build_activation
from distributed_at.models.base import IMAGE_CHANNELS, Network, conv1x1, conv3x3, pooled
from distributed_at.models.dropout import CounterDropout, dropping_layers
from distributed_at.models.norm import norm_factory

STEM_WIDTH = 16
STAGE_STRIDES = (1, 2, 2)


class WideBlock(nn.Module):
    """Norm, activation and 3x3 convolution, twice."""

    def __init__(self, config: ModelConfig, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        norm = norm_factory(config)
        self.bn1 = norm(in_channels)
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn2 = norm(width)
        self.dropout = CounterDropout(config.dropout) if config.dropout else nn.Identity()
        self.conv2 = conv3x3(width, width)
        self.activation = build_activation(config)
        self.convShortcut = conv1x1(in_channels, width, stride) if in_channels != width else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) -> (N, width, H / stride, W / stride)."""
        out = self.activation(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = self.dropout(self.activation(self.bn2(self.conv1(out))))
        return self.conv2(out) + shortcut


class WideStage(nn.Module):
    """The blocks of one width; a module of its own only for the sake of the published parameter names."""

    def __init__(self, config: ModelConfig, in_channels: int, width: int, stride: int, count: int) -> None:
        super().__init__()
        blocks = [WideBlock(config, in_channels, width, stride)]
        blocks += [WideBlock(config, width, width, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(*blocks)


class WideResNet(Network):
    """WRN-depth-widen: a 16-channel 3x3 stem, then three stages of (depth - 4) / 6 blocks of 16w, 32w and 64w channels.

    Args:
        config: depth, widen, norm, activation; stem and base_width are not read here.
        num_classes: width of the logits.
    """

    def __init__(self, config: ModelConfig, *, num_classes: int) -> None:
        super().__init__(config, num_classes)
        assert config.depth is not None
        assert config.widen is not None
        count = (config.depth - 4) // 6
        channels = STEM_WIDTH
        self.conv1 = conv3x3(IMAGE_CHANNELS, channels)
        for index, stride in enumerate(STAGE_STRIDES):
            width = STEM_WIDTH * config.widen * 2**index
            # widen 1 keeps the first stage's width: its first block then has no projection and needs stride 1
            self.add_module(f"block{index + 1}", WideStage(config, channels, width, stride, count))
            channels = width
        self.bn1 = norm_factory(config)(channels)
        self.activation = build_activation(config)
        self.fc = nn.Linear(channels, num_classes)
        for number, layer in enumerate(dropping_layers(self)):
            layer.number = number

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes) of normalised pixels (N, 3, H, W)."""
        x = self.conv1(x)
        for index in range(len(STAGE_STRIDES)):
            x = self.run_stage(getattr(self, f"block{index + 1}").layer, x)
        return self.fc(pooled(self.activation(self.bn1(x))))
