"""Extra images with pseudo-labels, in the two forms that the field publishes them in. Nothing in such a file is run.

The pickle of Carmon et al. 2019 ("Unlabeled data improves adversarial robustness"; 500K of Tiny Images) is a dictionary
of ``data`` and ``extrapolated_targets``; the archives of Rebuffi et al. 2021 ("Fixing data augmentation to improve
adversarial robustness"; generated images) are ``.npz`` files of ``image`` and ``label``.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from distributed_at.data.safe_pickle import load_data_pickle
from distributed_at.errors import DataError

PICKLE_KEYS = ("data", "extrapolated_targets")
NPZ_KEYS = ("image", "label")
MOST_CLASSES = 1000
_IMAGE = (32, 32, 3)
_ZIP_MAGIC = b"PK\x03\x04"
_MOST_EXPANSION = 100  # unpacked over packed bytes; photographs reach 2, deflate itself 1032


@dataclass(frozen=True, kw_only=True)
class ExtraImages:
    """Images beside a data set, with the labels that a model gave them.

    Attributes:
        images: (N, 32, 32, 3) uint8.
        labels: (N,) int64, each at least 0.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def labels_per_class(self) -> dict[int, int]:
        """Return label -> number of images, in the order of labels; labels that no image has are left out."""
        labels, counts = np.unique(self.labels, return_counts=True)
        return dict(zip(labels.tolist(), counts.tolist(), strict=True))


def read_extra(path: str | Path, *, num_classes: int = MOST_CLASSES) -> ExtraImages:
    """Read a file of extra images.

    Args:
        path: a pickle or an ``.npz`` archive; which one is told by its content.
        num_classes: labels lie in [0, num_classes).

    Raises:
        DataError: an absent, damaged or hostile file, other keys, shapes or types, a label out of range, or sizes that
            the file's own bytes cannot hold (found before memory is taken).
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            is_archive = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    keys = NPZ_KEYS if is_archive else PICKLE_KEYS
    images, labels = _read_archive(path) if is_archive else _read_pickle(path)
    if images.dtype != np.uint8 or images.shape[1:] != _IMAGE or not len(images):
        raise DataError(f"{path}: '{keys[0]}' must be uint8 (N, 32, 32, 3), found {images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path}: '{keys[1]}' must be {len(images)} integers, one per image, found {labels.dtype} {labels.shape}"
        )
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise DataError(f"{path}: '{keys[1]}' of image {at} is {labels[at]}; labels lie in [0, {num_classes})")
    return ExtraImages(images=images, labels=labels.astype(np.int64))


def _check_keys(path: Path, found: list[str], wanted: tuple[str, str]) -> None:
    missing = [key for key in wanted if key not in found]
    if missing:
        raise DataError(
            f"{path}: holds no {' and no '.join(map(repr, missing))}; extra images are a pickle of "
            f"{' and '.join(map(repr, PICKLE_KEYS))} or an .npz of {' and '.join(map(repr, NPZ_KEYS))}, "
            f"and this file holds {', '.join(map(repr, sorted(found)[:8])) or 'nothing'}"
        )


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    content = load_data_pickle(path)
    _check_keys(path, [str(key) for key in content], PICKLE_KEYS)
    images, labels = (content[key] for key in PICKLE_KEYS)
    for key, value in zip(PICKLE_KEYS, (images, labels), strict=True):
        if not isinstance(value, np.ndarray):
            raise DataError(f"{path}: {key!r} must be a numpy array, found {type(value).__name__}")
    return images, labels


def _read_archive(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            _check_keys(path, [name.removesuffix(".npy") for name in archive.namelist()], NPZ_KEYS)
            images, labels = (_read_member(path, archive, key) for key in NPZ_KEYS)
    except DataError:
        raise
    except Exception as error:  # a malformed archive raises almost any type
        raise DataError(f"{path}: not a whole .npz archive ({type(error).__name__}: {error}). Get it again.") from None
    return images, labels


def _read_member(path: Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """Return one array after its header's shape has been held against the bytes that are really there."""
    entry = archive.getinfo(f"{key}.npy")
    held = path.stat().st_size
    if entry.compress_size > held or entry.file_size > _MOST_EXPANSION * max(entry.compress_size, 1):
        raise DataError(
            f"{path}: {key!r} would unpack {entry.compress_size:,} bytes to {entry.file_size:,}; images do not, so this "
            "file is refused before it fills the memory"
        )
    with archive.open(entry) as stream:
        shape, kind = _header(stream)
        promised = stream.tell() + math.prod(shape) * kind.itemsize
    if kind.hasobject:
        raise DataError(f"{path}: {key!r} holds Python objects, which can run code when they are read; nothing was run")
    if promised != entry.file_size:
        raise DataError(f"{path}: {key!r} says {kind} {shape}, {promised:,} bytes, and holds {entry.file_size:,}")
    with archive.open(entry) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Return (shape, dtype) of an array in numpy's format, reading no more than its header."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(stream)
    return shape, kind
