"""Resizes decoded windows to the network's square: one function behind both CPU decoders, so that they differ in decoding alone.

Torch's bicubic kernel for uint8 (a = -0.5, widened when shrinking), which rounds to 8 bits between its two passes as
Pillow's ``resize`` does: the pixels that most published networks were trained on, at a fraction of the time of DALI's own
float resize. It computes in fixed point and in the calling thread alone. Or OpenCV's bicubic kernel, which TensorFlow codes of
the time used: a = -0.75 over the four nearest pixels whatever the scale, rounded once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional

from distributed_at.config.data import ResizeFilter
from distributed_at.data.augment import Views

# What a protocol says of each
FILTERS: dict[ResizeFilter, str] = {
    "antialiased": "bicubic, antialiased",
    "opencv": "bicubic as OpenCV's, not antialiased",
}


def resample(
    window: np.ndarray, views: Views, position: int, out: np.ndarray, *, resize: ResizeFilter = "antialiased"
) -> None:
    """Write the square of view ``position`` into ``out``.

    Args:
        window: (height, width, 3) uint8, the part of the image that ``views.windows[position]`` names.
        views: of the batch.
        position: of this image in the batch.
        out: (size, size, 3) uint8, written in place.
        resize: the kernel.

    Raises:
        ValueError: the window lies partly outside the image, so that less of it was decoded.
    """
    height, width = (int(v) for v in views.windows[position, 2:])
    if window.shape != (height, width, 3):
        raise ValueError(f"the image is smaller than its window {height} x {width}")
    size = (int(views.resized[position, 0]), int(views.resized[position, 1]))
    if size != (height, width):
        pixels = torch.from_numpy(np.ascontiguousarray(window)).unsqueeze(0).permute(0, 3, 1, 2)  # channels_last
        window = _resized(pixels, size, resize)[0].permute(1, 2, 0).numpy()
    y, x = (int(v) for v in views.corners[position])
    square = window[y : y + views.size, x : x + views.size]
    if not views.flips[position]:
        out[...] = square
        return
    for channel in range(3):  # an inner loop over columns; over the three colours it takes ten times as long
        out[..., channel] = square[:, ::-1, channel]


def _resized(pixels: torch.Tensor, size: tuple[int, int], resize: ResizeFilter) -> torch.Tensor:
    if resize == "antialiased":
        return functional.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    # in float: torch's uint8 form rounds between its passes, which OpenCV does not
    wide = functional.interpolate(pixels.float(), size=size, mode="bicubic", antialias=False, align_corners=False)
    return wide.round_().clamp_(0, 255).to(torch.uint8)
