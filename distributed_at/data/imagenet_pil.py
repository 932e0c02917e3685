"""Decodes images with Pillow: the fallback where there is no DALI, with the same pixels as DALI on the CPU."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import torch
from PIL import Image

from distributed_at.config.data import ResizeFilter
from distributed_at.data.augment import Views
from distributed_at.data.inspection import FORMATS, damage
from distributed_at.data.resample import resample


class PilDecoder:
    """Turns encoded images into uint8 squares, one thread an image."""

    name = "pil"

    def __init__(self, *, num_threads: int, resize: ResizeFilter = "antialiased") -> None:
        self._resize = resize
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
                window = _window(encoded[position], views, position)
                resample(window, views, position, out[position], resize=self._resize)
            except Exception as error:  # Pillow raises many types on damaged files
                failures[position] = damage(encoded[position].tobytes()) or f"cannot be decoded: {error}"

        list(self._pool.map(one, range(len(encoded))))
        return torch.from_numpy(out), failures

    def describe(self) -> str:
        """Return the backend and its version."""
        return f"pil {PIL.__version__}, torch {torch.__version__}"

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


def _window(encoded: np.ndarray, views: Views, position: int) -> np.ndarray:
    """Decode an image and return its window, (height, width, 3) uint8, cut at the image's edges."""
    top, left, height, width = (int(v) for v in views.windows[position])
    with Image.open(io.BytesIO(encoded.tobytes()), formats=FORMATS) as image:
        colour = image if image.mode == "RGB" else image.convert("RGB")  # convert copies even what is RGB already
        box = (left, top, min(left + width, image.width), min(top + height, image.height))
        return np.array(colour.crop(box))  # a copy that may be written, as torch wants it
