"""What the second run of a forward must share with the first, where activation checkpointing repeats it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from distributed_at.models.branches import BranchedNorm, branched_layers
from distributed_at.models.norm import bn_layers


def recomputation(module: nn.Module) -> AbstractContextManager[None]:
    """Return the context of a repeated forward of ``module``: on the branch of *now*, and moving no statistics.

    Called in the first forward and entered in the backward pass, when the network may stand on another branch.
    """
    return _repeated(module, [(layer, layer.branch) for layer in branched_layers(module)])


@contextmanager
def _repeated(module: nn.Module, branches: list[tuple[BranchedNorm, str]]) -> Iterator[None]:
    norms = list(bn_layers(module))
    now = [(layer, layer.branch) for layer, _ in branches]
    for norm in norms:
        norm.recomputing = True
    for layer, branch in branches:
        layer.branch = branch
    try:
        yield
    finally:
        for norm in norms:
            norm.recomputing = False
        for layer, branch in now:
            layer.branch = branch
