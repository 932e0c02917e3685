"""CIFAR-10 and CIFAR-100 in their published layouts, the Python batches and the binary ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distributed_at.catalogue.datasets import Opener
from distributed_at.data.arrays import Arrays, from_arrays
from distributed_at.data.safe_pickle import load_data_pickle
from distributed_at.errors import DataError

_ROW = 3 * 32 * 32
PUBLISHED_SIZES = {"train": 50_000, "test": 10_000}
Warn = Callable[[str, str], None]


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where one data set keeps its files."""

    python_folder: str
    binary_folder: str
    python_files: dict[str, tuple[str, ...]]
    binary_files: dict[str, tuple[str, ...]]
    label_key: str
    meta_file: str
    names_key: str
    label_bytes: int  # per row of the binary version; the last one is the fine label
    num_classes: int


LAYOUTS = {
    "cifar10": _Layout(
        python_folder="cifar-10-batches-py",
        binary_folder="cifar-10-batches-bin",
        python_files={"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        binary_files={"train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test": ("test_batch.bin",)},
        label_key="labels",
        meta_file="batches.meta",
        names_key="label_names",
        label_bytes=1,
        num_classes=10,
    ),
    "cifar100": _Layout(
        python_folder="cifar-100-python",
        binary_folder="cifar-100-binary",
        python_files={"train": ("train",), "test": ("test",)},
        binary_files={"train": ("train.bin",), "test": ("test.bin",)},
        label_key="fine_labels",
        meta_file="meta",
        names_key="fine_label_names",
        label_bytes=2,
        num_classes=100,
    ),
}


def find_cifar(path: Path, dataset: str) -> tuple[Path, bool]:
    """Return (folder of the batches, whether it is the binary version), in ``path`` or one level below it.

    Raises:
        DataError: neither version is there; the message lists what was looked for and what was found.
    """
    layout = LAYOUTS[dataset]
    for folder, files, binary in (
        (layout.python_folder, layout.python_files, False),
        (layout.binary_folder, layout.binary_files, True),
    ):
        for candidate in (path / folder, path):
            if any((candidate / name).is_file() for names in files.values() for name in names):
                return candidate, binary
    found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else None
    state = "does not exist" if found is None else f"holds {found or 'nothing'}"
    raise DataError(
        f"data.path {path}: looked for {layout.python_folder}/ or {layout.binary_folder}/ ({dataset}); the folder {state}. "
        f"Unpack the archive there, correct data.path, or set data.download: true."
    )


def _read_python(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    batch = load_data_pickle(path)
    rows, labels = batch.get("data"), batch.get(layout.label_key)
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != _ROW:
        found = f"{rows.dtype} {rows.shape}" if isinstance(rows, np.ndarray) else type(rows).__name__
        raise DataError(f"{path}: 'data' must be uint8 rows of {_ROW} values (3 x 32 x 32), found {found}")
    if not isinstance(labels, list) or len(labels) != len(rows) or not all(type(y) is int for y in labels):
        raise DataError(f"{path}: '{layout.label_key}' must be a list of {len(rows)} integers, one per image")
    return rows, np.asarray(labels, dtype=np.int64)


def _read_binary(path: Path, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    row = layout.label_bytes + _ROW
    values = np.fromfile(path, dtype=np.uint8)
    if len(values) == 0 or len(values) % row:
        raise DataError(
            f"{path}: {len(values)} bytes are not whole rows of {row} (labels and 3 x 32 x 32 pixels). "
            f"Delete it and unpack the archive again."
        )
    values = values.reshape(-1, row)
    return values[:, layout.label_bytes :], values[:, layout.label_bytes - 1].astype(np.int64)


def read_cifar(
    path: Path, dataset: str, split: str, *, warn: Warn | None = None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read a published split.

    Args:
        path: folder that holds the batches' folder, or that folder itself.
        dataset: 'cifar10' or 'cifar100'.
        split: 'train' or 'test'.
        warn: called with (code, message) where the number of images is not the published one.

    Returns:
        images (N, 32, 32, 3) uint8, labels (N,) int64, class names (empty for the binary version).

    Raises:
        DataError: absent, incomplete or malformed files.
    """
    layout = LAYOUTS[dataset]
    folder, binary = find_cifar(path, dataset)
    names = (layout.binary_files if binary else layout.python_files)[split]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: {dataset} lacks {', '.join(missing)}. Unpack the archive again.")
    parts = [(_read_binary if binary else _read_python)(folder / name, layout) for name in names]
    labels = np.concatenate([part[1] for part in parts])
    wrong = (labels < 0) | (labels >= layout.num_classes)
    if wrong.any():
        raise DataError(f"{folder}: label {labels[wrong][0]} is outside [0, {layout.num_classes}) of {dataset}")
    if len(labels) != PUBLISHED_SIZES[split] and warn is not None:
        warn(
            "data_size",
            f"{folder}: {len(labels)} {split} images; {dataset} as published has {PUBLISHED_SIZES[split]}",
        )
    rows = np.concatenate([part[0] for part in parts])
    images = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, labels, () if binary else _class_names(folder, layout)


def _class_names(folder: Path, layout: _Layout) -> tuple[str, ...]:
    if not (folder / layout.meta_file).is_file():
        return ()
    names: Any = load_data_pickle(folder / layout.meta_file).get(layout.names_key, [])
    return tuple(n.decode("latin1") if isinstance(n, bytes) else str(n) for n in names)


def _arrays(dataset: str) -> Opener:
    def read(path: Path | None, split: str, image_size: int, warn: Warn | None) -> Arrays:
        assert path is not None
        return Arrays(*read_cifar(path, dataset, split, warn=warn))

    layout = LAYOUTS[dataset]
    return from_arrays(read, files=f"{layout.python_folder}/ or {layout.binary_folder}/")


open_cifar10, open_cifar100 = _arrays("cifar10"), _arrays("cifar100")
