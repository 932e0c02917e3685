"""The networks that a recipe can name: our families with their layouts, other libraries', a user's own.

Only names and layouts are here, so that a recipe is read without torch; ``models/`` builds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from distributed_at.registry import Registry

LIBRARIES = ("torchvision", "timm")  # "torchvision:resnet50", "timm:convnext_tiny"


class Layout(NamedTuple):
    """A network of ours: family, blocks per stage and kind of block; None where the recipe gives them."""

    family: str
    blocks: tuple[int, ...] | None = None
    block: str | None = None


LAYOUTS: dict[str, Layout] = {
    "resnet18": Layout("resnet", (2, 2, 2, 2), "basic"),
    "resnet34": Layout("resnet", (3, 4, 6, 3), "basic"),
    "resnet50": Layout("resnet", (3, 4, 6, 3), "bottleneck"),
    "resnet101": Layout("resnet", (3, 4, 23, 3), "bottleneck"),
    "resnet152": Layout("resnet", (3, 8, 36, 3), "bottleneck"),
    "resnet200": Layout("resnet", (3, 24, 36, 3), "bottleneck"),
    # depth = 3 * sum(blocks) + 2; stages two and three in R-200's ratio of 2:3, the rest is unpublished
    "resnet338": Layout("resnet", (3, 42, 64, 3), "bottleneck"),
    "resnet518": Layout("resnet", (3, 66, 100, 3), "bottleneck"),
    "resnet638": Layout("resnet", (3, 82, 124, 3), "bottleneck"),
    "resnet": Layout("resnet"),
    "preact_resnet18": Layout("preact_resnet", (2, 2, 2, 2), "basic"),
    "preact_resnet34": Layout("preact_resnet", (3, 4, 6, 3), "basic"),
    "preact_resnet50": Layout("preact_resnet", (3, 4, 6, 3), "bottleneck"),
    "preact_resnet": Layout("preact_resnet"),
    "wide_resnet": Layout("wide_resnet"),
}

# A plug-in's entry: called with num_classes, and with image_size and the recipe's model.options where it takes them.
Builder = Callable[..., Any]


class _Networks(Registry[Layout | Builder]):
    """Our names, plug-ins' names, and ``LIBRARY:NAME``, which is looked up where the network is built."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and library_of(name) is not None)


NETWORKS = _Networks(
    "network", field="model.arch", builtin=LAYOUTS, forms=("torchvision:NAME", "timm:NAME", "FILE.py:FUNCTION")
)


def library_of(arch: str) -> str | None:
    """Return the library that ``LIBRARY:NAME`` names, None for other names."""
    library, colon, name = arch.partition(":")
    return library if colon and name and library in LIBRARIES else None


def is_foreign(arch: str) -> bool:
    """Whether a network is not one of our families: its layers are converted, its layout is its own."""
    return arch not in LAYOUTS


def file_of(arch: str) -> tuple[str, str] | None:
    """Return (file, function) of ``FILE.py:FUNCTION``, None for other names."""
    file, colon, function = arch.rpartition(":")
    return (file, function) if colon and file.endswith(".py") and function.isidentifier() else None
