"""Borrow a model for an evaluation and give it back bitwise as it was: flags, buffers and random generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from distributed_at.models.branches import on_branch

Model = nn.Module | Callable[[torch.Tensor], torch.Tensor]
_PLAIN = (bool, int, float, str, type(None))


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    return {k: v for k, v in vars(module).items() if isinstance(v, _PLAIN)}


def _versions(model: nn.Module) -> dict[str, int]:
    """Map each parameter and buffer to torch's count of in-place changes to it."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor._version for name, tensor in tensors if not tensor.is_inference()}


@contextmanager
def borrowed(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` in eval mode without weight gradients; afterwards restore every flag of every submodule.

    Flags are restored one by one rather than by ``train()``, because layers may hold a mode of their own (a frozen
    BN inside a training model). Writing to a parameter or buffer meanwhile is an error and not repaired in silence.

    Raises:
        RuntimeError: where a parameter or buffer was changed inside the block.
    """
    flags = {module: _plain_attributes(module) for module in model.modules()}
    needed = {parameter: parameter.requires_grad for parameter in model.parameters()}
    before = _versions(model)
    try:
        model.eval()
        for parameter in needed:
            parameter.requires_grad_(False)  # spares the activations that only weight gradients would need
        yield model
        after = _versions(model)
    finally:
        for module, saved in flags.items():
            vars(module).update(saved)
        for parameter, wanted in needed.items():
            parameter.requires_grad_(wanted)
    changed = sorted(name for name in before if after.get(name) != before[name])
    if changed:
        raise RuntimeError(
            f"the evaluation changed {', '.join(changed[:5])}; weights and buffers must stay as they are"
        )


@contextmanager
def lent(model: Model, branch: str) -> Iterator[None]:
    """Borrow ``model`` and run it on ``branch``; a plain function is used as it is."""
    if not isinstance(model, nn.Module):
        yield
        return
    with borrowed(model), on_branch(model, branch):
        yield


def device_of(model: Model) -> torch.device:
    """Return where a model's first parameter or buffer is; the CPU for one that has none."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return torch.device("cpu")


@contextmanager
def isolated_generators(device: torch.device) -> Iterator[None]:
    """Let foreign code seed global generators and set trace functions, and undo it: torch, CUDA, numpy, random."""
    devices = sorted({device.index or 0, torch.cuda.current_device()}) if device.type == "cuda" else []
    numpy_state, python_state, trace = np.random.get_state(), random.getstate(), sys.gettrace()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        sys.settrace(trace)
