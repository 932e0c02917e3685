"""Holds a network in evaluation mode for the length of an attack and gives every flag back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Put an ``nn.Module`` that is training into eval mode, then restore each submodule's own flags.

    In train mode an attack's forwards would move BN's running statistics and draw dropout from the global generator.
    Any other callable is used in the mode that it holds: that is how the trainer attacks with batch statistics.
    """
    if not isinstance(model, nn.Module) or not any(m.training for m in model.modules()):
        yield
        return
    # plain flags, not only ``training``: norm layers may hold a mode of their own that eval() changes
    flags = [
        (m, {k: v for k, v in vars(m).items() if isinstance(v, (bool, str)) or v is None}) for m in model.modules()
    ]
    model.eval()
    try:
        yield
    finally:
        for module, values in flags:
            for name, value in values.items():
                object.__setattr__(module, name, value)
