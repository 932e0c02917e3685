"""Data sets that are one array in memory: what is read once becomes a split of ours, with its ids, views and checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from distributed_at.catalogue.datasets import Opener
from distributed_at.config import DataConfig
from distributed_at.data.download import download
from distributed_at.data.source import ArraySource
from distributed_at.data.split import check_classes, split_ids
from distributed_at.errors import DataError

Published = Literal["train", "test"]
Warn = Callable[[str, str], None]


@dataclass(frozen=True)
class Arrays:
    """A published split.

    Attributes:
        images: (N, H, H, 3) uint8.
        labels: (N,) int64.
        class_names: empty where nobody says them.
        ids: rows that belong to the split; None = all.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...] = ()
    ids: np.ndarray | None = None


# (folder or None, published split, image_size, warn) -> its arrays
Read = Callable[[Path | None, Published, int, Warn | None], Arrays]


def from_arrays(read: Read, *, files: str | None = None) -> Opener:
    """Return the ``open`` of a ``Dataset`` whose published splits ``read`` reads, from ``files`` of a folder if any."""

    def opened(
        config: DataConfig,
        split: Literal["train", "validation", "test"],
        *,
        seed: int,
        warn: Warn | None = None,
        **_: object,
    ) -> ArraySource:
        name, facts = config.dataset, config.facts
        if facts.image_size is not None and config.image_size != facts.image_size:
            raise DataError(
                f"data.image_size is {config.image_size}, but {name} has images of {facts.image_size} pixels and is not "
                f"resized: set image_size: {facts.image_size}"
            )
        if facts.classes is not None:
            check_classes(config, facts.classes, name)
        classes = facts.classes or config.num_classes
        if classes is None:
            raise DataError(f"data set {name!r} does not say its number of classes: give data.num_classes")
        if files is not None and config.path is None:
            fetch = "" if facts.fetch is None else "; with data.download=true its publisher's are fetched into it"
            raise DataError(f"data.path is null: give data.path=FOLDER, which holds {files}{fetch}")
        path = None if config.path is None else Path(config.path).expanduser()
        if config.download and path is not None:
            download(name, path)
        published: Published = "test" if split == "test" else "train"
        found = read(path, published, config.image_size, warn)
        wrong = np.flatnonzero((found.labels < 0) | (found.labels >= classes))
        if len(wrong):
            raise DataError(
                f"data set {name!r}, {published}: label {found.labels[wrong[0]]} of item {wrong[0]} is outside 0 to "
                f"{classes - 1}"
            )
        ids = np.arange(len(found.labels), dtype=np.int64) if found.ids is None else found.ids
        return ArraySource(
            found.images,
            found.labels,
            name=name,
            split=split,
            sample_ids=split_ids(ids, config, split, seed=seed),
            num_classes=classes,
            augment=config.augment,
            seed=seed,
            class_names=found.class_names,
        )

    return opened
