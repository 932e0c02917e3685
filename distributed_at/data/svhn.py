"""SVHN, cropped digits (format 2), from the published .mat files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from distributed_at.data.arrays import Arrays, from_arrays
from distributed_at.errors import DataError

NUM_CLASSES = 10
PUBLISHED_SIZES = {"train": 73_257, "test": 26_032}


def read_svhn(
    path: Path, split: str, *, warn: Callable[[str, str], None] | None = None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read ``<split>_32x32.mat`` from ``path`` or from its subfolder ``svhn``.

    MAT files of version 5 hold arrays; scipy's reader builds arrays from them and calls nothing that a file names.
    The digit 0, stored as class 10, becomes class 0.

    Returns:
        images (N, 32, 32, 3) uint8, labels (N,) int64, class names.

    Raises:
        DataError: absent or malformed file.
    """
    from scipy.io import loadmat  # here, because only SVHN needs scipy

    file_name = f"{split}_32x32.mat"
    file = next((f for f in (path / file_name, path / "svhn" / file_name) if f.is_file()), None)
    if file is None:
        found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else None
        state = "does not exist" if found is None else f"holds {found or 'nothing'}"
        raise DataError(
            f"data.path {path}: looked for {file_name} (svhn, cropped digits); the folder {state}. "
            f"Correct data.path, or set data.download: true."
        )
    try:
        content = loadmat(str(file), variable_names=("X", "y"))
    except Exception as error:  # scipy raises many types on malformed files
        raise DataError(
            f"{file}: not a complete MAT file of version 5 ({type(error).__name__}: {error}). "
            f"Delete it and get it again from its publisher."
        ) from None
    images, labels = content.get("X"), content.get("y")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[:3] != (32, 32, 3):
        raise DataError(
            f"{file}: 'X' must be uint8 of shape (32, 32, 3, N), found {getattr(images, 'dtype', None)} "
            f"{getattr(images, 'shape', None)}"
        )
    if images.ndim == 3:  # MATLAB drops a last dimension of one
        images = images[..., None]
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "uif" or labels.size != images.shape[3]:
        raise DataError(f"{file}: 'y' must hold {images.shape[3]} numbers, one per image")
    labels = labels.reshape(-1).astype(np.int64) % 10
    if len(labels) != PUBLISHED_SIZES[split] and warn is not None:
        warn("data_size", f"{file}: {len(labels)} images; svhn {split} as published has {PUBLISHED_SIZES[split]}")
    return np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels, tuple(str(d) for d in range(10))


def _read(path: Path | None, split: str, image_size: int, warn: Callable[[str, str], None] | None) -> Arrays:
    assert path is not None
    return Arrays(*read_svhn(path, split, warn=warn))


open_svhn = from_arrays(_read, files="train_32x32.mat and test_32x32.mat")
