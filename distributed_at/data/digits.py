"""The 8 x 8 handwritten digits that scikit-learn carries: real data without a download, for smoke runs and tests."""

from __future__ import annotations

import numpy as np

from distributed_at.data.arrays import Arrays, from_arrays
from distributed_at.data.split import fixed_test_ids

NUM_CLASSES = 10
IMAGE_SIZE = 8
TEST_SIZE = 360


def read_digits() -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return images (1797, 8, 8, 3) uint8, labels (1797,) int64 and class names; 16 grey levels become 0..255."""
    from sklearn.datasets import load_digits  # here, because importing scikit-learn takes a second

    data = load_digits()
    grey = np.round(data.images * 255 / 16).astype(np.uint8)
    images = np.ascontiguousarray(np.repeat(grey[..., None], 3, axis=-1))
    return images, data.target.astype(np.int64), tuple(str(d) for d in range(10))


def digits_ids(split: str, num_samples: int) -> np.ndarray:
    """Return the sorted ids of 'train' or 'test' (360 images, always the same); ids are rows of scikit-learn's set."""
    train, test = fixed_test_ids(num_samples, TEST_SIZE)
    return train if split == "train" else test


def _read(path: object, split: str, image_size: int, warn: object) -> Arrays:
    images, labels, class_names = read_digits()
    return Arrays(images, labels, class_names, digits_ids(split, len(labels)))


open_digits = from_arrays(_read)
