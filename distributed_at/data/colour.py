"""Colour jitter on uint8 images, with parameters from counters; the same code serves every decoder.

Follows the training augmentation of Xie & Yuille's ImageNet code: brightness, contrast, saturation and PCA lighting in
a random order, the result of each clipped and truncated to uint8 before the next.
"""

from __future__ import annotations

import math
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from distributed_at.rng import Purpose, below, uniform

OPERATIONS = ("brightness", "contrast", "saturation", "lighting")
_ORDERS = tuple(permutations(OPERATIONS))
STRENGTH = 0.4
LIGHTING_STD = 0.1
_DRAWS = 9  # order of the operations has its own draw; three factors, six words for three normals
# Principal components of ImageNet's RGB values (Krizhevsky et al., "ImageNet classification", 4.1), /1 units.
PRINCIPAL_VALUES = np.array([0.2175, 0.0188, 0.0045])
PRINCIPAL_COMPONENTS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
_LUMA = np.array([299, 587, 114], dtype=np.float32)  # thousandths of ITU-R BT.601, as cv2.cvtColor


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Colour parameters of one image: the order of the operations, three factors, the RGB shift in /255."""

    order: tuple[str, ...]
    brightness: float
    contrast: float
    saturation: float
    shift: tuple[float, float, float]


def jitters(ids: np.ndarray, *, epoch: int, seed: int) -> list[Jitter]:
    """Return each sample's parameters: factors uniform in [0.6, 1.4), lighting normal with std 0.1 per component."""
    orders = below(len(_ORDERS), seed, Purpose.COLOUR, epoch, ids, 1, draw=1)[:, 0]
    draws = uniform(seed, Purpose.COLOUR, epoch, ids, _DRAWS).astype(np.float64)
    out = []
    for order, row in zip(orders, draws, strict=True):
        # scalar double arithmetic: a vectorised log may round differently with the sample's place in the batch
        normals = [
            math.sqrt(-2 * math.log(row[3 + 2 * k] + 2.0**-25)) * math.cos(2 * math.pi * row[4 + 2 * k])
            for k in range(3)
        ]
        weights = [LIGHTING_STD * value * 255 * normal for value, normal in zip(PRINCIPAL_VALUES, normals, strict=True)]
        brightness, contrast, saturation = (1 - STRENGTH + 2 * STRENGTH * row[:3]).tolist()
        shift = tuple(sum(vector[k] * weights[k] for k in range(3)) for vector in PRINCIPAL_COMPONENTS)
        out.append(
            Jitter(order=_ORDERS[order], brightness=brightness, contrast=contrast, saturation=saturation, shift=shift)
        )
    return out


# Below, ``pixels`` is (H, 3 W) float32 that holds whole numbers in [0, 255], a row's colours in turn: numpy's inner loops
# then run over whole rows. Each operation changes it in place.


def _truncate(pixels: np.ndarray) -> None:
    np.clip(pixels, 0, 255, out=pixels)
    np.floor(pixels, out=pixels)


def _each_pixel(colour: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Return (3 W,) float32: the three values of ``colour`` repeated along a row of ``pixels``."""
    return np.tile(np.asarray(colour, dtype=np.float32), pixels.shape[1] // 3)


def _brightness(pixels: np.ndarray, jitter: Jitter) -> None:
    pixels *= np.float32(jitter.brightness)


def _contrast(pixels: np.ndarray, jitter: Jitter) -> None:
    columns = pixels.sum(axis=0)  # exact: whole numbers below 2^24 for 65,000 rows
    mean = columns.reshape(-1, 3).sum(axis=0, dtype=np.float64) / (pixels.size // 3)  # per channel
    pixels *= np.float32(jitter.contrast)
    pixels += _each_pixel(mean * (1 - jitter.contrast), pixels)


def _saturation(pixels: np.ndarray, jitter: Jitter) -> None:
    channels = [pixels[:, c::3] for c in range(3)]
    grey = channels[0] * _LUMA[0]
    for channel, weight in zip(channels[1:], _LUMA[1:], strict=True):
        grey += channel * weight  # whole numbers: exact in any order
    grey += 500
    grey /= 1000
    np.floor(grey, out=grey)
    grey *= np.float32(1 - jitter.saturation)
    pixels *= np.float32(jitter.saturation)
    for channel in channels:
        channel += grey


def _lighting(pixels: np.ndarray, jitter: Jitter) -> None:
    pixels += _each_pixel(np.array(jitter.shift), pixels)


_APPLY = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "lighting": _lighting}


def apply_jitter(image: np.ndarray, jitter: Jitter) -> np.ndarray:
    """Return the jittered copy of one (H, W, 3) uint8 image; every operation clips and truncates to whole numbers."""
    height, width = image.shape[:2]
    pixels = image.reshape(height, 3 * width).astype(np.float32)
    for name in jitter.order:
        _APPLY[name](pixels, jitter)
        _truncate(pixels)
    return pixels.astype(np.uint8).reshape(height, width, 3)


def jitter_batch(
    images: np.ndarray, ids: np.ndarray, *, epoch: int, seed: int, executor: Executor | None = None
) -> np.ndarray:
    """Return (N, H, W, 3) uint8 images jittered by their own counters; ``executor`` spreads them over threads."""
    parameters = jitters(ids, epoch=epoch, seed=seed)
    run = map if executor is None else executor.map
    return np.stack(list(run(apply_jitter, images, parameters))) if len(images) else images.copy()
