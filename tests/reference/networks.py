"""Two small residual networks as plain functions of named tensors, with batch norm, group norm and mixture batch norm.

A network's weights and running statistics are two dictionaries; nothing here is a module, keeps a mode or has a hook.
Mixture batch norm is two ordinary networks whose convolutions are the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Named = dict[str, Tensor]
Norm = Callable[[Tensor, str], Tensor]  # (activations, the layer's name) -> activations
OTHER = {"clean": "adv", "adv": "clean"}


def one_branch(named: Named, branch: str) -> Named:
    """Return the ordinary network that serves a branch: shared tensors, and of each mixture this branch's own."""
    return {n.replace(f".{branch}.", "."): t for n, t in named.items() if f".{OTHER[branch]}." not in n}


def forward(weights: Named, statistics: Named, x: Tensor, *, branch: str, bn: str, model: dict) -> tuple[Tensor, Named]:
    """Return logits (N, K) of images (N, 3, H, W) in [0, 1], and the running statistics after this forward.

    Args:
        weights, statistics: of the whole network.
        branch: "clean" or "adv".
        bn: "running" normalises with the running statistics, "batch" with those of x, "train" also moves the running ones.
        model: the recipe's section.
    """
    w, before = one_branch(weights, branch), one_branch(statistics, branch)
    after = dict(before)

    def batch_norm(x: Tensor, name: str) -> Tensor:
        mean, var = before[f"{name}.running_mean"], before[f"{name}.running_var"]
        if bn != "running":
            count = x.numel() // x.shape[1]
            mean = x.mean(dim=(0, 2, 3))
            var = (x - _column(mean)).square().mean(dim=(0, 2, 3))  # biased
            if bn == "train":
                m, unbiased = model["bn_momentum"], var.detach() * count / (count - 1)
                after[f"{name}.running_mean"] = (1 - m) * before[f"{name}.running_mean"] + m * mean.detach()
                after[f"{name}.running_var"] = (1 - m) * before[f"{name}.running_var"] + m * unbiased
                after[f"{name}.num_batches_tracked"] = before[f"{name}.num_batches_tracked"] + 1
        unit = (x - _column(mean)) / torch.sqrt(_column(var) + model["bn_eps"])
        return unit * _column(w[f"{name}.weight"]) + _column(w[f"{name}.bias"])

    def group_norm(x: Tensor, name: str) -> Tensor:
        groups = x.reshape(len(x), model["groups"], -1)
        deviation = groups - groups.mean(dim=2, keepdim=True)
        unit = deviation / torch.sqrt(deviation.square().mean(dim=2, keepdim=True) + model["bn_eps"])
        return unit.reshape(x.shape) * _column(w[f"{name}.weight"]) + _column(w[f"{name}.bias"])

    mean, std = (torch.tensor(model[key], dtype=x.dtype) for key in ("pixel_mean", "pixel_std"))
    network = {"preact_resnet": pre_activation, "resnet": post_activation}[model["arch"]]
    logits = network((x - _column(mean)) / _column(std), w, group_norm if model["norm"] == "gn" else batch_norm)
    whole = dict(statistics)
    for name in statistics:
        if f".{OTHER[branch]}." not in name:
            whole[name] = after[name.replace(f".{branch}.", ".")]
    return logits, whole


def _column(values: Tensor) -> Tensor:
    """Return a number a channel, shaped to meet (N, C, H, W)."""
    return values.reshape(1, -1, 1, 1)


def _conv(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    return F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)


def _blocks(w: Named) -> list[tuple[str, int]]:
    """Return (name, stride) of every block: the first of each stage but the first halves the image."""
    names = sorted({".".join(n.split(".")[:2]) for n in w if n.startswith("layer")})
    return [(n, 2 if n.endswith(".0") and not n.startswith("layer1.") else 1) for n in names]


def pre_activation(x: Tensor, w: Named, norm: Norm) -> Tensor:
    """He et al. 2016b in the layout of Pang et al.'s code: the shortcut's convolution takes the activated input."""
    x = _conv(x, w["conv1.weight"])
    for name, stride in _blocks(w):
        active = F.relu(norm(x, f"{name}.bn1"))
        kernel = w.get(f"{name}.shortcut.0.weight")
        shortcut = x if kernel is None else _conv(active, kernel, stride)
        out = _conv(active, w[f"{name}.conv1.weight"], stride)
        x = _conv(F.relu(norm(out, f"{name}.bn2")), w[f"{name}.conv2.weight"]) + shortcut
    x = F.relu(norm(x, "bn")).mean(dim=(2, 3))
    return x @ w["linear.weight"].T + w["linear.bias"]


def post_activation(x: Tensor, w: Named, norm: Norm) -> Tensor:
    """He et al. 2016a, basic blocks, a norm behind the shortcut's convolution."""
    x = F.relu(norm(_conv(x, w["conv1.weight"]), "bn1"))
    for name, stride in _blocks(w):
        out = F.relu(norm(_conv(x, w[f"{name}.conv1.weight"], stride), f"{name}.bn1"))
        out = norm(_conv(out, w[f"{name}.conv2.weight"]), f"{name}.bn2")
        kernel = w.get(f"{name}.downsample.0.weight")
        shortcut = x if kernel is None else norm(_conv(x, kernel, stride), f"{name}.downsample.1")
        x = F.relu(out + shortcut)
    return x.mean(dim=(2, 3)) @ w["fc.weight"].T + w["fc.bias"]
