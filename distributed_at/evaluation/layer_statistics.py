"""What a batch norm would see: mean and variance of every channel that enters it, over one batch of images."""

from __future__ import annotations

import torch
from torch import nn

from distributed_at.errors import ConfigError, did_you_mean
from distributed_at.evaluation.isolation import borrowed

RUNNING_MEAN = ".running_mean"


def norm_layer_names(state: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of all batch norms in a state dict, in its order; both halves of a mixture count as one."""
    names = [key.removesuffix(RUNNING_MEAN) for key in state if key.endswith(RUNNING_MEAN)]
    return list(dict.fromkeys(name.removesuffix(".clean").removesuffix(".adv") for name in names))


def choose_layer(names: list[str], wanted: str | None) -> str:
    """Return ``wanted``, or a batch norm in the middle of the second stage: the paper's res3 block (figure 5).

    Raises:
        ConfigError: there is no such layer, or no batch norm at all.
    """
    if not names:
        raise ConfigError("the network has no batch norm, so there are no running statistics to draw")
    if wanted is not None:
        if wanted not in names:
            raise ConfigError(
                f"--layer {wanted!r} is no batch norm of this network.{did_you_mean(wanted, names)} It has: "
                f"{', '.join(names[:12])}{', …' if len(names) > 12 else ''}"
            )
        return wanted
    stage = [name for name in names if name.startswith("layer2.") and "downsample" not in name] or names
    return stage[len(stage) // 2]


def batch_statistics(
    network: nn.Module, images: torch.Tensor, *, layer: str, branch: str = "adv"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (C,) mean and (C,) unbiased variance of what enters ``layer`` for one batch; nothing in it moves.

    Earlier layers normalise with the batch too, as in training.

    Args:
        network: images -> logits.
        images: (N, 3, H, W) float in [0, 1], one BN group.
        layer: name of a batch norm.
        branch: which half of a mixture.
    """
    from distributed_at.models.branches import on_branch
    from distributed_at.models.norm import set_bn_mode

    seen: list[torch.Tensor] = []
    module = network.get_submodule(layer)
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        with borrowed(network), on_branch(network, branch), torch.no_grad():
            set_bn_mode(network, "batch")
            network(images)
    finally:
        handle.remove()
    x = seen[0].double()
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=1)
    return mean, variance
