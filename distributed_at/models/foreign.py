"""Networks that are not ours: torchvision's, timm's, a user's; with our pixels in front, our norms and masks inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from distributed_at.catalogue.networks import NETWORKS, library_of
from distributed_at.config import ModelConfig
from distributed_at.errors import ConfigError, did_you_mean
from distributed_at.models.base import Network, subsample_narrow
from distributed_at.models.convert import convert_batch_norms, convert_dropout
from distributed_at.user_code import told_by_line


class ForeignNetwork(Network):
    """Somebody's network behind our pixel normalisation; its state dict's names begin with ``network.``."""

    def __init__(self, config: ModelConfig, network: nn.Module, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.network = network

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (N, num_classes) of normalised pixels (N, 3, H, W)."""
        return self.network(x)


def build_foreign(config: ModelConfig, *, num_classes: int, image_size: int | None) -> ForeignNetwork:
    """Return the network that ``config.arch`` names, with its own initial weights and our layers in it.

    Args:
        config: arch, options, norm, groups, pixel constants.
        num_classes: width of the logits.
        image_size: height and width of the images, for networks that must know; None = their own.

    Raises:
        ConfigError: no such network, options that it does not take, or layers that cannot be taken over.
    """
    network = raw_network(config, num_classes=num_classes, image_size=image_size)
    network = convert_dropout(convert_batch_norms(network, config))
    subsample_narrow(network)
    return ForeignNetwork(config, network, num_classes)


def raw_network(config: ModelConfig, *, num_classes: int, image_size: int | None) -> nn.Module:
    """Return the network as its library or file builds it."""
    library, (_, _, name) = library_of(config.arch), config.arch.partition(":")
    given = {"num_classes": num_classes, **config.options}
    if library == "torchvision":
        network = _torchvision(name, given, image_size)
    elif library == "timm":
        network = _timm(name, given, image_size)
    else:
        network = _users(config, given, image_size)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"model.arch {config.arch}: gives a {type(network).__name__}, not a torch.nn.Module")
    return network


def _torchvision(name: str, given: dict[str, Any], image_size: int | None) -> Any:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(
            f"model.arch: torchvision has no classifier {name!r}.{did_you_mean(name, known)} It has {_some(known)}"
        )
    sized = {"image_size": image_size} if image_size is not None and name.startswith("vit_") else {}
    if name.startswith(("googlenet", "inception")):
        given = {"aux_logits": False, "init_weights": True, **given}
    return _called(f"torchvision:{name}", models.get_model_builder(name), {**sized, **given})


def _timm(name: str, given: dict[str, Any], image_size: int | None) -> Any:
    try:
        import timm
    except ImportError:
        raise ConfigError(f"model.arch 'timm:{name}' needs timm: pip install 'distributed-at[timm]'") from None
    if not timm.is_model(name):
        known = timm.list_models()
        raise ConfigError(f"model.arch: timm has no {name!r}.{did_you_mean(name, known)} It has {len(known)} networks")

    def build(**options: Any) -> Any:
        return timm.create_model(name, **options)

    if image_size is None or "img_size" in given:
        return _called(f"timm:{name}", build, given)
    try:
        return _called(f"timm:{name}", build, {**given, "img_size": image_size})
    except ConfigError as error:
        if "img_size" not in str(error):
            raise
        return _called(f"timm:{name}", build, given)  # convolutional: any size will do


def _users(config: ModelConfig, given: dict[str, Any], image_size: int | None) -> Any:
    builder: Any = NETWORKS[config.arch]
    origin = NETWORKS.origin(config.arch) or config.arch
    if not callable(builder):
        raise ConfigError(f"{origin}: the network {config.arch!r} must be a function or class, got {builder!r}")
    if image_size is not None and "image_size" in _parameters(builder):
        given = {"image_size": image_size, **given}
    with told_by_line(origin.rpartition(":")[0] if ".py:" in origin else origin):
        return _called(config.arch, builder, given)


def _parameters(builder: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(builder).parameters


def _called(what: str, builder: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call a builder; an argument that it does not take is told with what it takes."""
    parameters = _parameters(builder)
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        for name in given:
            if name not in parameters:
                raise ConfigError(
                    f"model.options.{name}: {what} takes no such argument.{did_you_mean(name, parameters)} "
                    f"It takes {', '.join(parameters)}"
                )
        return builder(**given)
    try:
        return builder(**given)
    except TypeError as error:
        raise ConfigError(f"model.options: {what} cannot be built with {given}: {error}") from None


def _some(names: list[str], count: int = 12) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def published_weights(config: ModelConfig, *, image_size: int | None) -> dict[str, torch.Tensor]:
    """Return the state dict of weights of torchvision or timm that ``model.pretrained`` names ('default' or a name).

    They come from the library's cache, or from the network where it has one.

    Raises:
        ConfigError: no such weights, or no way to fetch them.
    """
    library, (_, _, name) = library_of(config.arch), config.arch.partition(":")
    wanted = str(config.pretrained)
    try:
        if library == "torchvision":
            from torchvision import models

            weights = models.get_model_weights(name)
            known = {w.name: w for w in weights}
            key = "DEFAULT" if wanted.lower() == "default" else wanted
            if key not in known and key != "DEFAULT":
                raise ConfigError(
                    f"model.pretrained: {config.arch} has no weights {wanted!r}.{did_you_mean(wanted, known)} "
                    f"Allowed: default, {', '.join(known)}, or a file or run folder"
                )
            return dict(weights[key].get_state_dict(progress=False, check_hash=True))
        import timm

        if wanted.lower() != "default":
            raise ConfigError(
                f"model.pretrained: timm's weights are chosen by the name of the network ('timm:resnet50.a1_in1k'); "
                f"write pretrained: default, or a file or run folder, got {wanted!r}"
            )
        sized: dict[str, Any] = (
            {"img_size": image_size} if image_size is not None and _takes_size(config, image_size) else {}
        )
        return dict(timm.create_model(name, pretrained=True, **config.options, **sized).state_dict())
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"model.pretrained: the weights {wanted!r} of {config.arch} could not be fetched: {error}. Fetch them where "
            "there is a connection, and give the file"
        ) from None


def _takes_size(config: ModelConfig, image_size: int) -> bool:
    with torch.device("meta"):
        network = raw_network(config, num_classes=2, image_size=image_size)
    embed = getattr(network, "patch_embed", None)
    return getattr(embed, "img_size", None) is not None


def fitted_weights(network: nn.Module, state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return a published state dict in the names of ``network``, and the tensors that its new head does not take.

    A head of another number of classes begins anew: the weight and bias of the last linear layer or convolution, where
    they differ in their number of classes alone. Everything else is left as it is, for a strict load.
    """
    own = network.state_dict()
    prefix = "network." if isinstance(network, ForeignNetwork) else ""
    named = {key if key.startswith(prefix) else f"{prefix}{key}": value for key, value in state.items()}
    for name, layer in network.named_modules():  # timm's norm layers stand one level deeper once converted
        if isinstance(layer, nn.Sequential) and "norm" in layer._modules:
            for key in [key for key in named if key.rpartition(".")[0] == name]:
                named[f"{name}.norm.{key.rpartition('.')[2]}"] = named.pop(key)
    classes = getattr(network, "num_classes", None)
    heads = {f"{n}.{p}" for n, m in network.named_modules() if _is_head(m, classes) for p in ("weight", "bias")}
    dropped = [
        key
        for key, value in named.items()
        if key in heads and key in own and value.shape != own[key].shape and value.shape[1:] == own[key].shape[1:]
    ]
    return {key: value if key not in dropped else own[key] for key, value in named.items()}, dropped


def _is_head(layer: nn.Module, classes: int | None) -> bool:
    return getattr(layer, "out_features", getattr(layer, "out_channels", None)) == classes
