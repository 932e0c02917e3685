"""Finds images that are nearly one of a test set, so that nobody trains on what is measured.

The measure is the root mean square of pixel differences, in grey levels of 255, to the nearest test image or its mirror
image. It is exact and costs little: means over blocks of pixels differ at most as much as the pixels do (Jensen), so a matrix
product of small vectors tells which pairs can be near at all, and only those are compared pixel by pixel. Tools for
near-duplicates in general (imagededup, fastdup) hash or embed images; a hash has no such bound, and an embedding is
another network to trust.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

_BLOCKS = 8  # a side; 32 x 32 pixels become 8 x 8 means a channel
_CHUNK = 512  # images whose distances are held at once
_PAIRS = 4096  # pairs that are compared pixel by pixel at once
_SLACK = 0.05  # grey levels: what float32 can lose in the bound


class NearTest:
    """Distances of images to the nearest image of a test set."""

    def __init__(self, test: np.ndarray, *, within: float, device: torch.device | str = "cpu") -> None:
        """Compare with ``test`` (M, H, H, 3) uint8; distances above ``within`` grey levels are not told apart."""
        if test.ndim != 4 or test.dtype != np.uint8 or not len(test):
            raise ValueError(f"test images are uint8 (M, H, H, 3), got {test.dtype} {test.shape}")
        self._device, self._within = torch.device(device), float(within)
        self._test = torch.from_numpy(np.concatenate([test, test[:, :, ::-1]])).to(self._device)
        self._count, self._size = len(test), test.shape[1]
        self._means = self._block_means(self._test)
        self._squares = (self._means**2).sum(dim=1)

    def _block_means(self, images: torch.Tensor) -> torch.Tensor:
        """Return (N, D) float32 whose squared distances are at most the mean squared differences of the pixels.

        Each block counts by its share of the pixels; where blocks do not divide the image the last ones are smaller.
        """
        edges = np.unique(np.linspace(0, self._size, min(_BLOCKS, self._size) + 1).round().astype(int))
        pixels = images.to(torch.float32) - 127.5  # small numbers lose less in the product
        parts = []
        for top, bottom in pairwise(edges.tolist()):
            for left, right in pairwise(edges.tolist()):
                share = (bottom - top) * (right - left) / (self._size**2 * 3)
                parts.append(pixels[:, top:bottom, left:right].mean(dim=(1, 2)) * float(np.sqrt(share)))
        return torch.cat(parts, dim=1)

    def distances(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (N,) float32 distances, infinite above ``within``, and (N,) int64 rows of the nearest test image, -1 = none."""
        found = [self._of_chunk(images[start : start + _CHUNK]) for start in range(0, len(images), _CHUNK)]
        if not found:
            return np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])

    def _of_chunk(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = torch.from_numpy(np.ascontiguousarray(images)).to(self._device)
        means = self._block_means(own)
        bound = (means**2).sum(dim=1)[:, None] + self._squares[None, :] - 2.0 * (means @ self._means.T)
        rows, columns = torch.nonzero(bound <= (self._within + _SLACK) ** 2, as_tuple=True)
        nearest = torch.full((len(own),), torch.inf, dtype=torch.float64)
        which = torch.full((len(own),), -1, dtype=torch.int64)
        for start in range(0, len(rows), _PAIRS):
            r, c = rows[start : start + _PAIRS], columns[start : start + _PAIRS]
            difference = (own[r].to(torch.int32) - self._test[c].to(torch.int32)).flatten(1)
            exact = (difference**2).sum(dim=1).cpu().double() / difference.shape[1]
            for row, column, square in zip(r.tolist(), c.tolist(), exact.tolist(), strict=True):
                if square < nearest[row] and square <= self._within**2:
                    nearest[row], which[row] = square, column % self._count
        return nearest.sqrt().numpy().astype(np.float32), which.numpy()
