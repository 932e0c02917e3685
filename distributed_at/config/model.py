"""The network."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distributed_at.config.base import Activation, Architecture, Norm, Strict


class ModelConfig(Strict):
    """The network. Normalisation of pixels is part of it: it takes [0, 1]."""

    arch: Architecture
    blocks: tuple[int, ...] | None = Field(
        default=None, description="blocks per stage; required for 'resnet' and 'preact_resnet'"
    )
    block: Literal["basic", "bottleneck"] | None = Field(default=None, description="block of a free block list")
    base_width: int = Field(default=64, gt=0, description="channels of a ResNet's first stage; a WideResNet has widen")
    depth: int | None = Field(default=None, description="WideResNet depth, 6n + 4")
    widen: int | None = Field(default=None, gt=0, description="WideResNet widening factor")
    stem: Literal["imagenet", "cifar"] = Field(
        default="imagenet", description="'cifar' = 3x3 without pooling; a WideResNet always has its own 3x3 stem"
    )
    norm: Norm = "bn"
    groups: int = Field(default=32, gt=0, description="groups of group norm (Wu & He default)")
    bn_momentum: float = Field(default=0.1, gt=0, le=1)
    bn_eps: float = Field(default=1e-5, gt=0)
    sync_bn: bool = Field(default=False, description="synchronise BN statistics over all ranks")
    activation: Activation = "relu"
    softplus_beta: float = Field(default=1.0, gt=0)
    leaky_slope: float = Field(default=0.01, ge=0)
    celu_alpha: float = Field(default=1.2, gt=0, description="1.2 as in the Bag-of-tricks code")
    zero_init_gamma: bool = False
    init: Literal["default", "torchvision", "xie", "wrn"] = Field(
        default="default", description="'default' = the architecture's own"
    )
    preact_shortcut: Literal["activated", "raw"] = Field(
        default="activated", description="input of a PreActBlock's shortcut convolution (Pang et al.'s code)"
    )
    dropout: float = Field(default=0.0, description="0, as in the papers' WideResNets: masks would not resume exactly")
    pixel_mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    pixel_std: tuple[float, ...] = (1.0, 1.0, 1.0)
    activation_checkpointing: bool = Field(
        default=False, description="recompute activations in the training pass; never in the attack"
    )

    @model_validator(mode="after")
    def _complete(self) -> ModelConfig:
        if self.arch in ("resnet", "preact_resnet") and (self.blocks is None or self.block is None):
            raise ValueError(
                f"arch '{self.arch}' needs blocks and block, e.g. blocks: [3, 8, 36, 3], block: bottleneck"
            )
        if self.arch == "wide_resnet":
            if self.depth is None or self.widen is None:
                raise ValueError("arch 'wide_resnet' needs depth and widen, e.g. depth: 34, widen: 10")
            if (self.depth - 4) % 6 or self.depth < 10:
                lower = max(10, (self.depth - 4) // 6 * 6 + 4)
                raise ValueError(
                    f"depth of a WideResNet is 6n + 4, got {self.depth}; the nearest are {lower} and {lower + 6}"
                )
        if self.dropout != 0:
            raise ValueError(
                f"dropout is {self.dropout:g}; only 0 is allowed: its masks come from a generator that no checkpoint holds, so "
                "a resumed run, or one on another number of workers, would be another run"
            )
        if any(s <= 0 for s in self.pixel_std):
            raise ValueError(f"pixel_std must be positive, got {self.pixel_std}")
        return self
