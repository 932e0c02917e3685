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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from distributed_at.config import DataConfig
from distributed_at.errors import DataError

if TYPE_CHECKING:
    from distributed_at.catalogue.datasets import Opener
    from distributed_at.data.source import ArraySource

# (folder or None, 'train' or 'test') -> the data set
Build = Callable[[Path | None, Literal["train", "test"]], Sequence[tuple[Any, int]]]


def mapped(build: Build) -> Opener:
    """Return the ``open`` of a ``Dataset`` whose splits ``build`` makes."""

    def opened(
        config: DataConfig, split: Literal["train", "validation", "test"], *, seed: int, **_: object
    ) -> ArraySource:
        from distributed_at.data.source import ArraySource
        from distributed_at.data.sources import check_classes, split_ids

        published: Literal["train", "test"] = "test" if split == "test" else "train"
        name = config.dataset
        given = build(None if config.path is None else Path(config.path).expanduser(), published)
        images, labels = _read(given, name, published, config.image_size)
        classes = config.num_classes or config.facts.classes
        if classes is None:
            raise DataError(f"data set {name!r} does not say its number of classes: give data.num_classes")
        check_classes(config, config.facts.classes or classes, name)
        wrong = np.flatnonzero((labels < 0) | (labels >= classes))
        if len(wrong):
            raise DataError(
                f"data set {name!r}, {published}: label {labels[wrong[0]]} of item {wrong[0]} is outside 0 to {classes - 1}"
            )
        return ArraySource(
            images,
            labels,
            name=name,
            split=split,
            sample_ids=split_ids(np.arange(len(labels), dtype=np.int64), config, split, seed=seed),
            num_classes=classes,
            augment=config.augment,
            seed=seed,
            class_names=tuple(str(name) for name in getattr(given, "classes", range(classes))),
        )

    return opened


def _read(given: Sequence[tuple[Any, int]], name: str, split: str, image_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, H, W, 3) uint8 and labels (N,) int64 of all items."""
    count = len(given)
    if not count:
        raise DataError(f"data set {name!r}, {split}: holds no images")
    images = np.empty((count, image_size, image_size, 3), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int64)
    for item in range(count):
        image, label = given[item]
        images[item], labels[item] = _pixels(image, f"data set {name!r}, {split}, item {item}", image_size), int(label)
    return images, labels


def _pixels(image: Any, where: str, image_size: int) -> np.ndarray:
    """Return one image (H, W, 3) uint8: a PIL image, or an array (H, W), (H, W, 1) or (H, W, 3) uint8."""
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
