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
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as cv2.cvtColor


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
        weights = [LIGHTING_STD * value * 255 * normal for value, normal in zip(_EIGENVALUES, normals, strict=True)]
        brightness, contrast, saturation = (1 - STRENGTH + 2 * STRENGTH * row[:3]).tolist()
        shift = tuple(sum(vector[k] * weights[k] for k in range(3)) for vector in _EIGENVECTORS)
        out.append(
            Jitter(order=_ORDERS[order], brightness=brightness, contrast=contrast, saturation=saturation, shift=shift)
        )
    return out


def _truncate(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _per_channel(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Apply a (256, 3) uint8 table to a (H, W, 3) image; point operations on uint8 are tables."""
    return np.stack([table[:, c][image[..., c]] for c in range(3)], axis=-1)


_LEVELS = np.arange(256, dtype=np.float64)[:, None].repeat(3, axis=1)


def _brightness(image: np.ndarray, jitter: Jitter) -> np.ndarray:
    return _truncate(_LEVELS[:, 0] * jitter.brightness)[image]


def _contrast(image: np.ndarray, jitter: Jitter) -> np.ndarray:
    height, width = image.shape[:2]
    columns = image.reshape(height, width * 3).sum(axis=0, dtype=np.uint32)  # whole rows at once: exact, and fast
    mean = columns.reshape(width, 3).sum(axis=0, dtype=np.int64) / (height * width)  # per channel
    return _per_channel(image, _truncate(_LEVELS * jitter.contrast + mean * (1 - jitter.contrast)))


def _saturation(image: np.ndarray, jitter: Jitter) -> np.ndarray:
    colour = image.astype(np.float32)
    red, green, blue = colour[..., 0], colour[..., 1], colour[..., 2]
    grey = np.floor(red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + np.float32(0.5))
    factor = np.float32(jitter.saturation)
    colour *= factor
    colour += (grey * (np.float32(1) - factor))[..., None]
    return _truncate(colour)


def _lighting(image: np.ndarray, jitter: Jitter) -> np.ndarray:
    return _per_channel(image, _truncate(_LEVELS + np.array(jitter.shift)))


_APPLY = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "lighting": _lighting}


def apply_jitter(image: np.ndarray, jitter: Jitter) -> np.ndarray:
    """Return the jittered copy of one (H, W, 3) uint8 image; every operation clips and truncates to uint8."""
    for name in jitter.order:
        image = _APPLY[name](image, jitter)
    return image


def jitter_batch(
    images: np.ndarray, ids: np.ndarray, *, epoch: int, seed: int, executor: Executor | None = None
) -> np.ndarray:
    """Return (N, H, W, 3) uint8 images jittered by their own counters; ``executor`` spreads them over threads."""
    parameters = jitters(ids, epoch=epoch, seed=seed)
    run = map if executor is None else executor.map
    return np.stack(list(run(apply_jitter, images, parameters))) if len(images) else images.copy()
