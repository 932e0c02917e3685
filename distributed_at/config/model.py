"""The network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distributed_at.catalogue.networks import LAYOUTS, NETWORKS, is_foreign
from distributed_at.catalogue.norms import NORMS, Norm
from distributed_at.config.base import Activation, Strict
from distributed_at.config.choice import Choice

# what a network that is not ours may be given; its layout, activations and initial weights are its own
_FOREIGN = frozenset({"arch", "options", "pretrained", "norm", "groups", "sync_bn", "pixel_mean", "pixel_std"})


# Fields added since evaluations have hashes. A new field joins them, with a default that means what was done before.
_LATER = ("options", "pretrained")


class ModelConfig(Strict):
    """The network. Normalisation of pixels is part of it: it takes [0, 1]."""

    arch: Annotated[str, Choice(NETWORKS)] = Field(
        description="one of ours, 'torchvision:NAME', 'timm:NAME', 'FILE.py:FUNCTION' beside the recipe, or a plug-in's"
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of a network that is not ours, e.g. {drop_path_rate: 0.1}"
    )
    pretrained: str | None = Field(
        default=None,
        description="weights to begin with: a file, a run folder, or the name of weights of torchvision or timm "
        "('default'); a head of another number of classes begins anew",
    )
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
    norm: Annotated[str, Choice(NORMS)] = Field(
        default="bn", description="a network that is not ours has its nn.BatchNorm2d turned into this"
    )
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
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="of a WideResNet, between a block's convolutions; 0 as in the papers' codes",
    )
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
        if is_foreign(self.arch):
            fields = type(self).model_fields
            given = [name for name in fields if name not in _FOREIGN and getattr(self, name) != fields[name].default]
            if given:
                raise ValueError(
                    f"{given[0]} belongs to the networks of this package; '{self.arch}' takes options: {{...}} of its own"
                )
        elif self.options:
            raise ValueError(f"options belong to networks that are not ours; '{self.arch}' has fields of its own")
        if self.dropout and self.arch != "wide_resnet" and self.arch in LAYOUTS:
            raise ValueError(f"dropout belongs to arch 'wide_resnet', got {self.dropout:g} for '{self.arch}'")
        if any(s <= 0 for s in self.pixel_std):
            raise ValueError(f"pixel_std must be positive, got {self.pixel_std}")
        return self

    @staticmethod
    def survives(field: str, arch: str) -> bool:
        """Whether a field that a recipe inherits still means something once it names another network, ``arch``."""
        if field in ("options", "pretrained"):  # of one network alone
            return False
        if is_foreign(arch):
            return field in _FOREIGN
        if arch == "wide_resnet":
            return field not in ("blocks", "block")
        given = LAYOUTS[arch].blocks is None  # the recipe says it: then it may come from a recipe of another family
        return field not in (
            ("depth", "widen", "dropout") if given else ("blocks", "block", "depth", "widen", "dropout")
        )

    @property
    def description(self) -> str:
        """The network as JSON, which the hashes of evaluations hold: what came later stands in it where it says something."""
        silent = {
            name
            for name in _LATER
            if getattr(self, name) == type(self).model_fields[name].get_default(call_default_factory=True)
        }
        return self.model_dump_json(exclude=silent)

    @property
    def norm_facts(self) -> Norm:
        """What the norm is: branches, running statistics."""
        return NORMS[self.norm]

    def __hash__(self) -> int:  # of what it says: ``options`` is a dict
        return hash(self.model_dump_json())
