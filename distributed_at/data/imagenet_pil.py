"""Decodes and resamples images with Pillow and torch: the fallback that makes DALI's pixels where there is no DALI.

The same decoder library (libjpeg-turbo), window, cubic kernel (a = -0.5, widened when shrinking) and float
intermediate as the DALI pipeline; Pillow's own resize rounds between its two passes and is twenty times further off.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import torch
from PIL import Image
from torch.nn import functional

from distributed_at.data.augment import Views

# Largest differences to the DALI CPU backend, in grey levels; docs/data.md has the measurements. The maximum
# occurs at window borders, where DALI, which decodes the window alone, interpolates colour without its surroundings.
MEAN_TOLERANCE = 0.1
MAX_TOLERANCE = 24


class PilDecoder:
    """Turns encoded images into uint8 squares, one thread an image."""

    name = "pil"

    def __init__(self, *, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")

    def decode(self, encoded: Sequence[np.ndarray], views: Views) -> tuple[torch.Tensor, dict[int, str]]:
        """Decode N images.

        Returns:
            (N, size, size, 3) uint8, and position -> reason for those that cannot be decoded (their pixels are 0).
        """
        out = np.zeros((len(encoded), views.size, views.size, 3), dtype=np.uint8)
        failures: dict[int, str] = {}

        def one(position: int) -> None:
            try:
                out[position] = _decode_one(encoded[position], views, position)
            except Exception as error:  # Pillow raises many types on damaged files
                failures[position] = f"{type(error).__name__}: {error}"

        list(self._pool.map(one, range(len(encoded))))
        return torch.from_numpy(out), failures

    def describe(self) -> str:
        """Return the backend and its version."""
        return f"pil {PIL.__version__}, torch {torch.__version__}"

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


def _decode_one(encoded: np.ndarray, views: Views, position: int) -> np.ndarray:
    top, left, height, width = (int(v) for v in views.windows[position])
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        window = np.asarray(image.convert("RGB"))[top : top + height, left : left + width]
    if window.shape[:2] != (height, width):
        raise ValueError(f"the image is smaller than its window {height} x {width}")
    pixels = torch.from_numpy(window.copy()).permute(2, 0, 1)[None].float()
    size = (int(views.resized[position, 0]), int(views.resized[position, 1]))
    if size != (height, width):
        pixels = functional.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    y, x = (int(v) for v in views.corners[position])
    square = pixels[0, :, y : y + views.size, x : x + views.size].round_().clamp_(0, 255).to(torch.uint8)
    out = square.permute(1, 2, 0).numpy()
    return out[:, ::-1] if views.flips[position] else out
