"""The optimisers that a recipe can name: their facts, one entry each. What builds them is in ``engine/optimizers.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distributed_at.registry import Registry, load_attribute

if TYPE_CHECKING:
    import torch

# (parameter groups, each with its weight decay; the recipe's optimizer section; lr) -> the optimiser
Build = Callable[[list[dict[str, Any]], Any, float], "torch.optim.Optimizer"]


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What the rest of the package asks about an optimiser.

    Attributes:
        title: for pages and messages.
        build: (groups, config, lr) -> ``torch.optim.Optimizer``, or "module:function". What a plug-in's takes beyond
            the common fields stands in ``optimizer.options``.
        states: numbers that it keeps for each weight, for the estimates of ``plan``.
        states_without_momentum: the same where ``optimizer.momentum`` is 0; None = as many.
        fields: those of ``optimizer`` that it reads and not every one does; None = it may read any (a plug-in's). What
            an optimiser does not read may not be given, and is not inherited by it.
        nesterov: whether it has Nesterov's form.
        whole_parameters: it looks at a parameter as a whole, which ZeRO 1 and 2 cut into slices.
        backends: implementations that a recipe may choose.
    """

    title: str
    build: str | Build
    states: int
    states_without_momentum: int | None = None
    fields: tuple[str, ...] | None = None
    nesterov: bool = False
    whole_parameters: bool = False
    backends: tuple[str, ...] = ("torch",)

    def builder(self) -> Build:
        """Return what builds it."""
        found: Build = load_attribute(self.build) if isinstance(self.build, str) else self.build
        return found

    def states_of(self, momentum: float) -> int:
        """Return the numbers kept for each weight at this momentum."""
        fewer = self.states_without_momentum
        return self.states if momentum or fewer is None else fewer


_BUILD = "distributed_at.engine.optimizers"
OPTIMIZERS: Registry[Optimizer] = Registry(
    "optimiser",
    field="optimizer.name",
    entry=Optimizer,
    builtin={
        "sgd": Optimizer(
            title="SGD with momentum",
            build=f"{_BUILD}:build_sgd",
            states=1,
            states_without_momentum=0,
            fields=("momentum", "nesterov", "backend"),
            nesterov=True,
            backends=("torch", "apex"),
        ),
        "sgd_gc": Optimizer(
            title="SGD on centralised gradients (Yong et al. 2020)",
            build=f"{_BUILD}:build_sgd_gc",
            states=1,
            states_without_momentum=0,
            fields=("momentum",),
            whole_parameters=True,
        ),
        "sgd_gcc": Optimizer(
            title="SGD, convolutions' gradients centralised (Yong et al. 2020)",
            build=f"{_BUILD}:build_sgd_gcc",
            states=1,
            states_without_momentum=0,
            fields=("momentum",),
            whole_parameters=True,
        ),
        "rmsprop": Optimizer(
            title="RMSprop with momentum",
            build=f"{_BUILD}:build_rmsprop",
            states=2,
            fields=("momentum", "rmsprop_decay", "eps"),
        ),
        "rmsprop_tf": Optimizer(
            title="RMSProp in TensorFlow's form",
            build=f"{_BUILD}:build_rmsprop_tf",
            states=2,
            fields=("momentum", "rmsprop_decay", "eps"),
        ),
        "adam": Optimizer(
            title="Adam, weight decay in the gradient",
            build=f"{_BUILD}:build_adam",
            states=2,
            fields=("betas", "eps"),
        ),
        "adamw": Optimizer(
            title="Adam, weight decay apart", build=f"{_BUILD}:build_adamw", states=2, fields=("betas", "eps")
        ),
    },
)
