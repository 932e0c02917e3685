"""The norms that a recipe can name: their facts, one entry each. The layers are in ``models/norm.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distributed_at.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Norm:
    """What the rest of the package asks about a norm.

    Attributes:
        title: for pages and messages.
        label: in figures, as the papers print it.
        layer: "module:function" that makes a layer: (config, channels) -> module.
        branches: clean and adversarial images have statistics and affine parameters of their own.
        running_statistics: it keeps means and variances that evaluation normalises by, so it has modes and groups.
    """

    title: str
    label: str
    layer: str
    branches: bool = False
    running_statistics: bool = False

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
            title="batch norm", label="BN", layer="distributed_at.models.norm:make_batch_norm", running_statistics=True
        ),
        "mbn": Norm(
            title="mixture batch norm (Xie & Yuille 2020, section 4.2)",
            label="MBN",
            layer="distributed_at.models.norm:make_mixture_batch_norm",
            branches=True,
            running_statistics=True,
        ),
        "gn": Norm(title="group norm (Wu & He 2018)", label="GN", layer="distributed_at.models.norm:make_group_norm"),
    },
)


def recorded_norm(model: Mapping[str, Any]) -> Norm:
    """Return the norm that a recorded ``model`` section names; batch norm where its plug-in is not loaded here."""
    name = str(model.get("norm", "bn"))
    return NORMS[name if name in NORMS else "bn"]
