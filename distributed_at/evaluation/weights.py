"""The identity of a model's weights, as one sha256 over everything that its output in eval mode depends on."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

# wrappers put these in front of names without changing what the model computes
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def _bare_name(name: str) -> str:
    for prefix in _WRAPPER_PREFIXES:
        while name.startswith(prefix):
            name = name[len(prefix) :]
    return name.replace("._orig_mod.", ".")


def weights_hash(module: nn.Module) -> str:
    """Return the sha256 (64 hex digits) of a module's parameters and buffers: names, dtypes, shapes and bytes.

    Device, order of registration and wrappers (DistributedDataParallel, ``torch.compile``) do not change it. BN's
    ``num_batches_tracked`` is left out: no output in eval mode depends on it, and exported weights often lack it.
    """
    digest = hashlib.sha256()
    state = {_bare_name(name): tensor for name, tensor in module.state_dict().items() if torch.is_tensor(tensor)}
    for name in sorted(state):
        if name.endswith("num_batches_tracked"):
            continue
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
