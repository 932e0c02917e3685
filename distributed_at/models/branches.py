"""Which set of a mixture norm a forward runs through: the layers that have several, and the switch over a network.

Networks take images alone; their norm layers hold the branch. A network without such layers has nothing to switch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from torch import nn

from distributed_at.errors import ConfigError, did_you_mean

Branch = Literal["clean", "adv"]
BRANCHES: tuple[str, ...] = get_args(Branch)


class BranchedNorm(nn.Module):
    """Base of norm layers that keep one set of statistics and parameters a branch.

    Attributes:
        branch: the one that forwards run through; set by ``on_branch`` and ``set_branch``.
    """

    branch: str = "adv"

    def serving(self, branch: str) -> nn.Module:
        """Return the layer that normalises for ``branch``."""
        raise NotImplementedError(f"{type(self).__name__} does not say which layer serves a branch")


def check_branch(branch: str) -> None:
    """Refuse anything but 'clean' and 'adv', so that a misspelt branch never runs on the wrong statistics."""
    if branch not in BRANCHES:
        raise ConfigError(f"branch must be one of {list(BRANCHES)}, got {branch!r}.{did_you_mean(branch, BRANCHES)}")


def branched_layers(module: nn.Module) -> list[BranchedNorm]:
    """Return the layers of ``module`` that have branches."""
    return [layer for layer in module.modules() if isinstance(layer, BranchedNorm)]


def set_branch(module: nn.Module, branch: str) -> None:
    """Let every later forward of ``module`` run on ``branch``."""
    check_branch(branch)
    for layer in branched_layers(module):
        layer.branch = branch


@contextmanager
def on_branch(module: nn.Module, branch: str) -> Iterator[None]:
    """Run the forwards of ``module`` within the block on ``branch``, and put back what each layer had before.

    Raises:
        ConfigError: there is no such branch; also for a network whose norms have none.
    """
    check_branch(branch)
    held = [(layer, layer.branch) for layer in branched_layers(module)]
    for layer, _ in held:
        layer.branch = branch
    try:
        yield
    finally:
        for layer, before in held:
            layer.branch = before
