"""Reads images that have no labels yet: files of extra images, a packed folder, or a folder of image files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distributed_at.data.extra_files import ROWS, ExtraFile, open_extra_file
from distributed_at.data.packed import PackedImages, is_packed
from distributed_at.data.packing import fingerprint
from distributed_at.errors import ConfigError, DataError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True)
class Unlabelled:
    """Images of one size in a fixed order; labels that stand beside them are not looked at.

    Attributes:
        image_size: height and width; image files of another size are cut to a square and resized (Pillow, bicubic).
        sources: by what it is told whether they have changed.
    """

    parts: tuple[ExtraFile | PackedImages | tuple[Path, ...], ...]
    image_size: int
    sources: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return sum(_count(part) for part in self.parts)

    def pieces(self, first: int = 0) -> Iterator[np.ndarray]:
        """Yield (n, H, H, 3) uint8 from image ``first`` on."""
        for part in self.parts:
            if first < _count(part):
                yield from self._of_part(part, first)
            first = max(0, first - _count(part))

    def _of_part(self, part: ExtraFile | PackedImages | tuple[Path, ...], first: int) -> Iterator[np.ndarray]:
        if isinstance(part, ExtraFile):
            yield from part.images_alone(first)
            return
        for start in range(first, _count(part), ROWS):
            rows = np.arange(start, min(start + ROWS, _count(part)))
            if isinstance(part, PackedImages):
                yield part.read(rows)
            else:
                yield np.stack([_decoded(part[row], self.image_size) for row in rows.tolist()])


def _count(part: ExtraFile | PackedImages | tuple[Path, ...]) -> int:
    return part.images if isinstance(part, ExtraFile) else len(part)


def open_unlabelled(paths: Sequence[Path], *, image_size: int) -> Unlabelled:
    """Open files and folders, in their order, as one sequence of images.

    Raises:
        DataError: one is not there, holds no images, or arrays of another size.
        ConfigError: nothing was named.
    """
    if not paths:
        raise ConfigError("no file or folder of images was named")
    parts: list[ExtraFile | PackedImages | tuple[Path, ...]] = []
    sources: list[dict[str, Any]] = []
    for path in paths:
        if is_packed(path):
            part = PackedImages(path)
            sources.append({"path": str(path.resolve()), "digest": part.manifest.digest})
            size = part.image_size
            parts.append(part)
        elif path.is_dir():
            files = tuple(sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file()))
            if not files:
                raise DataError(f"{path}: holds no packed set and no image file ({', '.join(_SUFFIXES)})")
            told = "".join(f"{p.relative_to(path)}\0{p.stat().st_size}\0" for p in files)
            sources.append({"path": str(path.resolve()), "listing": hashlib.sha256(told.encode()).hexdigest()})
            size = image_size
            parts.append(files)
        else:
            file = open_extra_file(path, need_labels=False)
            sources.append(fingerprint(path))
            size = file.image_size
            parts.append(file)
        if size != image_size:
            raise DataError(f"{path}: its images have {size} pixels, the network takes {image_size}")
    return Unlabelled(tuple(parts), image_size, tuple(sources))


def _decoded(path: Path, size: int) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as stored:
            image = stored.convert("RGB")
        if image.size == (size, size):
            return np.asarray(image)
        return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))
    except Exception as error:  # a damaged image raises almost any type
        raise DataError(f"{path}: cannot be decoded ({type(error).__name__}: {error}); remove it") from None
