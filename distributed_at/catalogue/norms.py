"""The norms that a recipe can name: their facts, one entry each. The layers are in ``models/norm.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distributed_at.registry import Registry, load_attribute

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Norm:
    """What the rest of the package asks about a norm.

    Attributes:
        title: for pages and messages.
        label: in figures, as the papers print it.
        layer: (model section, channels) -> module, or "module:function": makes a layer of a network of ours.
        take_over: (model section, nn.BatchNorm2d) -> module, or "module:function": what stands in another network where it had
            a batch norm; None = ``layer`` of as many channels, which begins anew.
        branches: clean and adversarial images have statistics and affine parameters of their own.
        running_statistics: it keeps means and variances that evaluation normalises by, so it has modes and groups.
    """

    title: str
    label: str
    layer: str | Callable[[Any, int], nn.Module]
    take_over: str | Callable[[Any, nn.BatchNorm2d], nn.Module] | None = None
    branches: bool = False
    running_statistics: bool = False

    def make(self, config: Any, channels: int) -> nn.Module:
        """Return a layer."""
        function = load_attribute(self.layer) if isinstance(self.layer, str) else self.layer
        made: nn.Module = function(config, channels)
        return made

    def instead_of(self, config: Any, layer: nn.BatchNorm2d) -> nn.Module:
        """Return what replaces a batch norm of another network, on its device, of its dtype and in its mode."""
        if self.take_over is None:
            made = self.make(config, layer.num_features).to(layer.weight.device, layer.weight.dtype)
        else:
            function = load_attribute(self.take_over) if isinstance(self.take_over, str) else self.take_over
            made = function(config, layer)
        return made.train(layer.training)

    @property
    def shared_statistics(self) -> bool:
        """Whether clean and adversarial images move the same statistics."""
        return self.running_statistics and not self.branches


NORMS: Registry[Norm] = Registry(
    "norm",
    field="model.norm",
    entry=Norm,
    builtin={
        "bn": Norm(
            title="batch norm",
            label="BN",
            layer="distributed_at.models.norm:make_batch_norm",
            take_over="distributed_at.models.convert:batch_norm",
            running_statistics=True,
        ),
        "mbn": Norm(
            title="mixture batch norm (Xie & Yuille 2020, section 4.2)",
            label="MBN",
            layer="distributed_at.models.norm:make_mixture_batch_norm",
            take_over="distributed_at.models.convert:mixture_batch_norm",
            branches=True,
            running_statistics=True,
        ),
        "gn": Norm(
            title="group norm (Wu & He 2018)",
            label="GN",
            layer="distributed_at.models.norm:make_group_norm",
            take_over="distributed_at.models.convert:group_norm",
        ),
    },
)


def recorded_norm(model: Mapping[str, Any]) -> Norm:
    """Return the norm that a recorded ``model`` section names; batch norm where its plug-in is not loaded here."""
    name = str(model.get("norm", "bn"))
    return NORMS[name if name in NORMS else "bn"]
