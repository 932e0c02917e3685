"""Crop windows and flips as pure functions of counters, and their application to arrays of equal-sized images.

Decoding and resampling of files of many sizes is in ``imagenet_dali.py`` and ``imagenet_pil.py``; colour is in
``colour.py``. A view depends on (seed, epoch, sample id) and the image's own size, never on its batch or rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distributed_at.config import AugmentConfig
from distributed_at.errors import ConfigError
from distributed_at.rng import Purpose, below, uniform

CROP_TRIES = 10
_DRAWS_PER_TRY = 5  # area, aspect, swap, top, left


@dataclass(frozen=True, kw_only=True)
class Views:
    """How N images become square inputs: cut a window, resize it, cut the square, flip.

    Attributes:
        windows: (N, 4) int64, top, left, height, width in the stored image, pixels.
        resized: (N, 2) int64, height and width that the window is resized to.
        corners: (N, 2) int64, top and left of the square inside the resized window.
        flips: (N,) bool, mirrored left to right.
        size: height and width of the result, pixels.
    """

    windows: np.ndarray
    resized: np.ndarray
    corners: np.ndarray
    flips: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.windows)

    def take(self, positions: np.ndarray) -> Views:
        """Return the views at ``positions``."""
        return Views(
            windows=self.windows[positions],
            resized=self.resized[positions],
            corners=self.corners[positions],
            flips=self.flips[positions],
            size=self.size,
        )


def flips(ids: np.ndarray, *, epoch: int, seed: int) -> np.ndarray:
    """Return (N,) bool: which samples are mirrored in this epoch, each with probability one half."""
    return below(2, seed, Purpose.FLIP, epoch, ids, 1)[:, 0] == 1


def centre_views(heights: np.ndarray, widths: np.ndarray, *, shortest_edge: int, size: int) -> Views:
    """Resize the shortest edge to ``shortest_edge``, then cut the central square of ``size`` pixels.

    Args:
        heights: (N,) of the stored images.
        widths: (N,).
        shortest_edge: pixels; the longer edge is rounded to the nearest pixel (halves up).
        size: pixels, at most ``shortest_edge``.
    """
    if shortest_edge < size:
        raise ConfigError(f"data.resize_size {shortest_edge} is smaller than data.image_size {size}")
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    shortest = np.minimum(heights, widths)
    resized = np.stack([(2 * edge * shortest_edge + shortest) // (2 * shortest) for edge in (heights, widths)], axis=1)
    zero = np.zeros_like(heights)
    return Views(
        windows=np.stack([zero, zero, heights, widths], axis=1),
        resized=resized,
        corners=(resized - size) // 2,
        flips=np.zeros(len(heights), dtype=bool),
        size=size,
    )


def random_resized_views(
    ids: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    *,
    epoch: int,
    seed: int,
    size: int,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (0.75, 4 / 3),
) -> Views:
    """Random-resized crops as the ImageNet code of Xie & Yuille draws them ("Intriguing properties", appendix; GoogLeNet).

    Up to ten tries of: a share of the area, uniform in ``area``; width over height, uniform in ``aspect``, inverted
    with probability one half; the first that fits is placed uniformly. Where none fits, the shortest edge is resized
    to ``size`` and the centre is cut. Flips are not drawn here.
    """
    heights, widths = np.asarray(heights, dtype=np.int64), np.asarray(widths, dtype=np.int64)
    draws = uniform(seed, Purpose.CROP, epoch, np.asarray(ids), CROP_TRIES * _DRAWS_PER_TRY).astype(np.float64)
    share, shape, swap, top, left = np.moveaxis(draws.reshape(len(ids), CROP_TRIES, _DRAWS_PER_TRY), 2, 0)
    pixels = (area[0] + share * (area[1] - area[0])) * (heights * widths)[:, None]
    ratio = aspect[0] + shape * (aspect[1] - aspect[0])
    width = np.floor(np.sqrt(pixels * ratio) + 0.5).astype(np.int64)  # (N, tries)
    height = np.floor(np.sqrt(pixels / ratio) + 0.5).astype(np.int64)
    width, height = np.where(swap < 0.5, height, width), np.where(swap < 0.5, width, height)
    fits = (width <= widths[:, None]) & (height <= heights[:, None]) & (width > 0) & (height > 0)
    chosen = (np.arange(len(ids)), fits.argmax(axis=1))  # argmax of booleans = the first that fits
    height, width = height[chosen], width[chosen]
    y = np.floor(top[chosen] * (heights - height + 1)).astype(np.int64)  # every position, the last one included
    x = np.floor(left[chosen] * (widths - width + 1)).astype(np.int64)
    fallback = centre_views(heights, widths, shortest_edge=size, size=size)
    found = fits.any(axis=1)[:, None]
    return Views(
        windows=np.where(found, np.stack([y, x, height, width], axis=1), fallback.windows),
        resized=np.where(found, size, fallback.resized),
        corners=np.where(found, 0, fallback.corners),
        flips=fallback.flips,
        size=size,
    )


def training_views(
    ids: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    *,
    epoch: int,
    seed: int,
    augment: AugmentConfig,
    size: int,
    shortest_edge: int,
) -> Views:
    """Return the training views of N stored images under ``augment``.

    Raises:
        ConfigError: ``augment.crop`` is 'pad', which needs images of equal size.
    """
    if augment.crop == "pad":
        raise ConfigError(
            "data.augment.crop 'pad' needs images of equal size (cifar10, cifar100, svhn, digits); "
            "for imagenet use 'random_resized' or 'none'"
        )
    if augment.crop == "random_resized":
        views = random_resized_views(
            ids, heights, widths, epoch=epoch, seed=seed, size=size, area=augment.area, aspect=augment.aspect
        )
    else:
        views = centre_views(heights, widths, shortest_edge=shortest_edge, size=size)
    if not augment.flip:
        return views
    return Views(
        windows=views.windows,
        resized=views.resized,
        corners=views.corners,
        flips=flips(ids, epoch=epoch, seed=seed),
        size=size,
    )


def _reflect(index: np.ndarray, length: int) -> np.ndarray:
    """Mirror indices outside [0, length) at the first and last pixel, without repeating them."""
    index = np.abs(index)
    return np.where(index >= length, 2 * (length - 1) - index, index)


def pad_crop_flip(
    images: np.ndarray, rows_of: np.ndarray, ids: np.ndarray, *, epoch: int, seed: int, augment: AugmentConfig
) -> np.ndarray:
    """Gather images from an array, padded and cropped and mirrored by counters, in one vectorised step.

    Args:
        images: (M, H, W, C) uint8, the whole set.
        rows_of: (N,) int64 rows of ``images``.
        ids: (N,) int64 sample ids that the counters are computed from.
        epoch: counter.
        seed: counter.
        augment: ``crop`` 'none' or 'pad', ``pad``, ``pad_mode``, ``flip``.

    Returns:
        (N, H, W, C) uint8, a new array. The window is uniform over the (2 pad + 1)^2 positions in the padded image.

    Raises:
        ConfigError: ``crop`` is 'random_resized', or a reflecting pad is not smaller than the image.
    """
    height, width = images.shape[1:3]
    if augment.crop == "random_resized":
        raise ConfigError("data.augment.crop 'random_resized' is for imagenet; these images take 'pad' or 'none'")
    pad = augment.pad if augment.crop == "pad" else 0
    if augment.pad_mode == "reflect" and pad >= min(height, width):
        raise ConfigError(f"data.augment.pad {pad} with pad_mode 'reflect' must be below the image size {height}")
    n = len(rows_of)
    y = np.broadcast_to(np.arange(height), (n, height))
    x = np.broadcast_to(np.arange(width), (n, width))
    if augment.flip:
        x = np.where(flips(ids, epoch=epoch, seed=seed)[:, None], width - 1 - x, x)
    if pad:
        shift = below(2 * pad + 1, seed, Purpose.CROP, epoch, ids, 2) - pad
        y, x = y + shift[:, :1], x + shift[:, 1:]
    if pad and augment.pad_mode == "zero":
        inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
        y, x = y.clip(0, height - 1), x.clip(0, width - 1)
        out = images[rows_of[:, None, None], y[:, :, None], x[:, None, :]]
        return out * inside[..., None].astype(np.uint8)
    if pad:
        y, x = _reflect(y, height), _reflect(x, width)
    return images[rows_of[:, None, None], y[:, :, None], x[:, None, :]]
