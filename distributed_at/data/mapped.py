"""Any data set in torchvision's style as a split of ours: ``len(d)`` and ``d[i] -> (image, label)``, through a plug-in.

    def build(path, split):                       # split is 'train' or 'test'
        return torchvision.datasets.FakeData(...)

    DATASETS = {"mine": Dataset(title="Mine", open=mapped(build), classes=10)}

Its images are read once and kept in memory, so it is for small images; larger ones belong into a folder
(``data.dataset: folder``). Augmentation is ours, from counters: give the data set no random transform of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distributed_at.catalogue.datasets import Opener
from distributed_at.data.arrays import Arrays, Published, from_arrays
from distributed_at.errors import DataError

# (folder or None, 'train' or 'test') -> the data set
Build = Callable[[Path | None, Published], Sequence[tuple[Any, int]]]


def mapped(build: Build) -> Opener:
    """Return the ``open`` of a ``Dataset`` whose splits ``build`` makes."""

    def read(path: Path | None, split: Published, image_size: int, warn: object) -> Arrays:
        given = build(path, split)
        count = len(given)
        if not count:
            raise DataError(f"the data set's {split} split holds no images")
        images = np.empty((count, image_size, image_size, 3), dtype=np.uint8)
        labels = np.empty(count, dtype=np.int64)
        for item in range(count):
            image, label = given[item]
            images[item], labels[item] = _pixels(image, f"{split} item {item} of the data set", image_size), int(label)
        return Arrays(images, labels, tuple(str(name) for name in getattr(given, "classes", ())))

    return from_arrays(read)


def _pixels(image: Any, where: str, image_size: int) -> np.ndarray:
    """Return one image (H, H, 3) uint8: a PIL image, or an array (H, H), (H, H, 1) or (H, H, 3) uint8."""
    if hasattr(image, "convert"):
        image = image.convert("RGB")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        raise DataError(
            f"{where}: {type(image).__name__} of {pixels.dtype}; give PIL images or uint8 arrays (no ToTensor: pixels are "
            "normalised by the model)"
        )
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape not in ((image_size, image_size, 1), (image_size, image_size, 3)):
        raise DataError(
            f"{where}: shape {pixels.shape}, and data.image_size is {image_size}: images must be that size, (H, W, 3)"
        )
    return np.broadcast_to(pixels, (image_size, image_size, 3))
