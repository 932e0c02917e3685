"""Extra images beside a data set, as a recipe's ``data.extra`` names them: packed where they are not, perhaps a part of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from distributed_at.config import ExtraConfig
from distributed_at.data.extra_files import UNLABELLED, open_extra_file
from distributed_at.data.identity import DataIdentity, counted
from distributed_at.data.index import Progress
from distributed_at.data.packed import PackedImages, is_packed
from distributed_at.data.packing import pack_extra, require_labels_below
from distributed_at.data.selection import best_of_each_class
from distributed_at.errors import ConfigError, DataError

CACHE = ".distributed_at_extra"


class ExtraSet:
    """Extra images of a run: rows 0 to ``len - 1``, all of a packed set or its best-scored ones.

    Attributes:
        packed: the set that they lie in.
        unlabelled: no image has a label; they read as -1.
    """

    def __init__(
        self, packed: PackedImages, *, num_classes: int, class_names: tuple[str, ...] = (), keep: int | None = None
    ) -> None:
        """Use ``packed``, of which ``keep`` images with the highest scores, ``keep / num_classes`` a class; None = all.

        Raises:
            DataError: a label is past the classes, or the set has no scores to choose by.
            ConfigError: a class has fewer images than are to be kept of it.
        """
        require_labels_below(packed.manifest, num_classes, packed.folder)
        self.packed = packed
        self.unlabelled = UNLABELLED in packed.manifest.counts
        self._keep, self._num_classes, self._class_names = keep, num_classes, class_names
        self._rows: np.ndarray | None = None
        if keep is not None:
            self._rows = best_of_each_class(
                packed.all_labels(), packed.all_scores(), keep, num_classes, field="data.extra.keep"
            )

    def __len__(self) -> int:
        return len(self.packed) if self._rows is None else len(self._rows)

    def _places(self, rows: np.ndarray) -> np.ndarray:
        return rows if self._rows is None else self._rows[rows]

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """Return the (N,) int64 labels of (N,) rows."""
        return self.packed.labels(self._places(rows))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return (N, H, H, 3) uint8 of (N,) rows."""
        return self.packed.read(self._places(rows))

    def identity(self) -> DataIdentity:
        """Return which images these are."""
        whole = self.packed.identity(self._class_names, self._num_classes)
        if self._rows is None:
            return whole
        kept = hashlib.sha256(whole.content.encode() + self._rows.astype("<i8").tobytes()).hexdigest()
        return replace(whole, counts=counted(self.packed.labels(self._rows), self._num_classes), content=kept)

    def close(self) -> None:
        """Close the files."""
        self.packed.close()


def open_extra(
    config: ExtraConfig,
    *,
    num_classes: int,
    image_size: int,
    class_names: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> ExtraSet:
    """Open what ``data.extra`` names; files are packed into a cache first, once.

    Raises:
        DataError, ConfigError: they cannot be used with this data set.
    """
    packed = PackedImages(packed_folder(config, num_classes=num_classes, progress=progress))
    if packed.image_size != image_size:
        raise DataError(
            f"{packed.folder}: its images have {packed.image_size} pixels, those of the data set {image_size}; extra images "
            "are not resized"
        )
    return ExtraSet(packed, num_classes=num_classes, class_names=class_names, keep=config.keep)


def packed_folder(config: ExtraConfig, *, num_classes: int, progress: Progress | None = None) -> Path:
    """Return the packed folder that a recipe's files are, or are packed into now if they are not yet."""
    paths = [Path(name).expanduser() for name in config.files]
    if len(paths) == 1 and (paths[0].is_dir() or is_packed(paths[0])):
        return paths[0]
    folders = [path for path in paths if path.is_dir()]
    if folders:
        raise ConfigError(
            f"data.extra.files: {folders[0]} is a folder beside {len(paths) - 1} others: name files, or one packed folder; "
            "distributed-at data pack-extra makes one of several files"
        )
    folder = cache_folder(paths, None if config.cache is None else Path(config.cache).expanduser())
    gone = [path for path in paths if not path.exists()]
    if gone:
        kept = (
            f"; the set packed from it stands in {folder}, which data.extra.files can name" if is_packed(folder) else ""
        )
        raise DataError(f"data.extra.files: {gone[0]} does not exist{kept}")
    pack_extra(paths, folder, num_classes=num_classes, replace=True, progress=progress)
    return folder


def cache_folder(paths: Sequence[Path], cache: Path | None) -> Path:
    """Return where a set of files is packed into: under ``cache``, beside the first file, or in the user's cache."""
    told = "\0".join(str(path.resolve()) for path in paths)
    name = f"{paths[0].stem}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    if cache is not None:
        return cache / name
    beside = paths[0].resolve().parent
    if (beside / CACHE / name).exists() or os.access(beside, os.W_OK):
        return beside / CACHE / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distributed_at" / "extra" / name


def labels_of_file(path: Path, *, num_classes: int) -> tuple[int, int, dict[int, int]]:
    """Read a file through; return its images, their size, and label -> images in the order of labels.

    Raises:
        DataError: it is not what it should be.
    """
    file = open_extra_file(path)
    counts: dict[int, int] = {}
    for _, labels in file.pieces(num_classes=num_classes):
        for label, count in zip(*(c.tolist() for c in np.unique(labels, return_counts=True)), strict=True):
            counts[label] = counts.get(label, 0) + count
    return file.images, file.image_size, dict(sorted(counts.items()))
