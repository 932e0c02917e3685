"""Which networks exist, and how a recipe's ``model`` section becomes one."""

from __future__ import annotations

from torch import nn

from distributed_at.catalogue.networks import LAYOUTS, Layout, is_foreign
from distributed_at.config import ModelConfig
from distributed_at.errors import ConfigError, did_you_mean
from distributed_at.models.foreign import build_foreign
from distributed_at.models.initialise import initialise
from distributed_at.models.preact_resnet import PreActResNet
from distributed_at.models.resnet import ResNet
from distributed_at.models.wide_resnet import WideResNet


def resolve_layout(config: ModelConfig) -> Layout:
    """Return the layout that a recipe asks for.

    Raises:
        ConfigError: where a field does not belong to the architecture, or contradicts it.
    """
    if config.arch not in LAYOUTS:
        raise ConfigError(
            f"model.arch must be one of {list(LAYOUTS)}, got {config.arch!r}.{did_you_mean(config.arch, LAYOUTS)}"
        )
    layout = LAYOUTS[config.arch]
    given = Layout(layout.family, config.blocks, config.block)
    if layout.family != "wide_resnet" and (config.depth is not None or config.widen is not None):
        raise ConfigError(f"model.depth and model.widen belong to arch 'wide_resnet'; the arch is {config.arch!r}")
    if layout.family == "wide_resnet":
        if config.blocks is not None or config.block is not None:
            raise ConfigError(
                "model.blocks and model.block do not belong to arch 'wide_resnet', which has depth and widen"
            )
        return layout
    if layout.blocks is None:
        if not config.blocks or min(config.blocks) < 1:
            raise ConfigError(
                f"model.blocks must hold at least one block a stage, e.g. [3, 8, 36, 3], got {list(config.blocks or ())}"
            )
        return given
    for field, value, own in (("blocks", given.blocks, layout.blocks), ("block", given.block, layout.block)):
        if value is not None and value != own:
            raise ConfigError(
                f"model.{field} of {config.arch!r} is {own}, got {value}; "
                f"for another layout write arch: {layout.family}, with blocks and block"
            )
    return layout


def build_model(config: ModelConfig, *, num_classes: int, image_size: int | None = None) -> nn.Module:
    """Return the network of a recipe, initialised from torch's global generator, in training mode.

    It is called as ``model(x) -> logits (N, num_classes)`` with x (N, 3, H, W), float in [0, 1]. Under
    ``torch.device("meta")`` it is built without memory. ``image_size``: height and width of the images, which some
    networks that are not ours must know.

    Raises:
        ConfigError: where fields contradict each other or a norm layer cannot be made.
    """
    if is_foreign(config.arch):
        return build_foreign(config, num_classes=num_classes, image_size=image_size)
    layout = resolve_layout(config)
    model: nn.Module
    if layout.family == "wide_resnet":
        model = WideResNet(config, num_classes=num_classes)
    else:
        assert layout.blocks is not None
        assert layout.block is not None
        network = ResNet if layout.family == "resnet" else PreActResNet
        model = network(config, num_classes=num_classes, blocks=layout.blocks, block=layout.block)
    initialise(model, config, family=layout.family)
    return model
