"""A packed set of extra images: raw pixels in shards that are read image by image, so that no set is ever in memory.

A folder of ``images-00000.bin``, ... (uint8, image after image, H x H x 3), ``labels-00000.bin``, ... (little-endian int16, -1
= no label), where a classifier scored them ``scores-00000.bin``, ... (little-endian float32), and ``extra.json``, which is
written last: a folder without it is not whole. Images are read by position and not through a memory map: what a map has
shown counts as the process's memory, and a file cut short under a map ends the process without a word.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distributed_at.data.identity import DataIdentity
from distributed_at.errors import DataError

MANIFEST = "extra.json"
JOURNAL = "packing.json"  # of a packing that has not come to its end
FORMAT = 1
LABEL, SCORE = np.dtype("<i2"), np.dtype("<f4")
_END = 4096  # bytes of each end of a shard that are compared whenever it is opened
_AGAIN = "pack it again: distributed-at data pack-extra FILES... --output FOLDER"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Some consecutive images of a set.

    Attributes:
        number: from 0.
        images: how many.
        digest: SHA-256 of pixels, labels and scores.
        ends: SHA-256 of the first and last 4 KiB of pixels, and of labels and scores.
    """

    number: int
    images: int
    digest: str
    ends: str

    def file(self, folder: Path, kind: str) -> Path:
        """Return the file of 'images', 'labels' or 'scores'."""
        return folder / f"{kind}-{self.number:05d}.bin"


def describe_shard(folder: Path, number: int, *, scored: bool) -> Shard:
    """Read a shard's files and return what the manifest says of them."""
    shard = Shard(number=number, images=0, digest="", ends="")
    labels = shard.file(folder, "labels")
    return Shard(
        number=number,
        images=labels.stat().st_size // LABEL.itemsize,
        digest=_digest([shard.file(folder, kind) for kind in _kinds(scored)]),
        ends=_ends(shard, folder, scored),
    )


def _kinds(scored: bool) -> tuple[str, ...]:
    return ("images", "labels", "scores") if scored else ("images", "labels")


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _ends(shard: Shard, folder: Path, scored: bool) -> str:
    digest = hashlib.sha256()
    with open(shard.file(folder, "images"), "rb") as file:
        digest.update(file.read(_END))
        file.seek(max(0, file.seek(0, os.SEEK_END) - _END))
        digest.update(file.read(_END))
    for kind in _kinds(scored)[1:]:
        digest.update(shard.file(folder, kind).read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``extra.json`` says.

    Attributes:
        image_size: height and width.
        counts: label -> images; -1 for images without a label.
        scored: whether a classifier's confidence stands beside every label.
        shards: in the order of images.
        sources: path, bytes and time of change of each file that it was packed from.
        made_by: how the labels came about, where a classifier gave them.
    """

    image_size: int
    counts: Mapping[int, int]
    scored: bool
    shards: tuple[Shard, ...]
    sources: tuple[Mapping[str, Any], ...] = ()
    made_by: Mapping[str, Any] | None = None

    @property
    def images(self) -> int:
        """Images of all shards."""
        return sum(shard.images for shard in self.shards)

    @property
    def digest(self) -> str:
        """SHA-256 over the contents of all shards."""
        told = [self.image_size, self.scored, *((shard.images, shard.digest) for shard in self.shards)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the text of ``extra.json``."""
        content = {
            "format": FORMAT,
            "images": self.images,
            "image_size": self.image_size,
            "counts": {str(label): count for label, count in sorted(self.counts.items())},
            "scored": self.scored,
            "digest": self.digest,
            "shards": [vars(shard) for shard in self.shards],
            "sources": list(self.sources),
            "made_by": self.made_by,
        }
        return json.dumps(content, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """Read ``extra.json`` of a folder.

    Raises:
        DataError: it is not there, of another format, or contradicts itself.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(_not_packed(folder)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_AGAIN}") from None
    try:
        if content["format"] != FORMAT:
            raise DataError(f"{path}: format {content['format']}, this version reads {FORMAT}; {_AGAIN}")
        manifest = Manifest(
            image_size=int(content["image_size"]),
            counts={int(label): int(count) for label, count in content["counts"].items()},
            scored=bool(content["scored"]),
            shards=tuple(
                Shard(number=int(s["number"]), images=int(s["images"]), digest=str(s["digest"]), ends=str(s["ends"]))
                for s in content["shards"]
            ),
            sources=tuple(content["sources"]),
            made_by=content["made_by"],
        )
        agrees = manifest.digest == content["digest"] and sum(manifest.counts.values()) == manifest.images > 0
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not the table of a packed set ({type(error).__name__}: {error}); {_AGAIN}") from None
    if not agrees:
        raise DataError(f"{path}: contradicts itself; {_AGAIN}")
    return manifest


def _not_packed(folder: Path) -> str:
    if (folder / JOURNAL).is_file():
        return f"{folder}: its packing was interrupted; give the same pack-extra command again, it goes on where it stopped"
    held = sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else None
    state = "does not exist" if held is None else f"holds {', '.join(held) or 'nothing'}"
    return f"{folder}: no packed set of extra images: looked for {MANIFEST} in it; the folder {state}"


def is_packed(path: str | Path) -> bool:
    """Whether a folder holds a packed set, whole."""
    return (Path(path) / MANIFEST).is_file()


class PackedImages:
    """Extra images in a packed folder, read by position; labels alone are in memory (2 bytes an image).

    Attributes:
        folder: where they lie.
        manifest: what the folder says of itself.
        image_size: height and width.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a packed folder and compare it with its table.

        Raises:
            DataError: it is not whole, or a shard is absent, of another size, or has other bytes at its ends.
        """
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.image_size = self.manifest.image_size
        self._bytes = self.image_size**2 * 3
        for name, reason in changed_shards(self.folder, self.manifest).items():
            raise DataError(f"{self.folder / name}: {reason}; restore it, or {_AGAIN}")
        self._starts = np.cumsum([0, *(shard.images for shard in self.manifest.shards)])
        self._labels = self._column("labels", LABEL)
        self._files: dict[int, int] = {}

    def __len__(self) -> int:
        return self.manifest.images

    def _column(self, kind: str, dtype: np.dtype) -> np.ndarray:
        parts = [np.fromfile(shard.file(self.folder, kind), dtype=dtype) for shard in self.manifest.shards]
        return np.concatenate(parts).astype(dtype.newbyteorder("="), copy=False)

    def labels(self, rows: np.ndarray) -> np.ndarray:
        """Return the (N,) int64 labels of (N,) rows."""
        return self._labels[rows].astype(np.int64)

    def all_labels(self) -> np.ndarray:
        """Return the (M,) int16 labels of all images."""
        return self._labels

    def all_scores(self) -> np.ndarray:
        """Return the (M,) float32 scores of all images.

        Raises:
            DataError: no classifier scored them.
        """
        if not self.manifest.scored:
            raise DataError(f"{self.folder}: its images have no scores; distributed-at data pseudolabel writes some")
        return self._column("scores", SCORE)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return (N, H, H, 3) uint8 of (N,) rows.

        Raises:
            DataError: a shard cannot be read to where an image should be.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise ValueError(f"rows lie in [0, {len(self)})")
        out = np.empty((len(rows), self.image_size, self.image_size, 3), dtype=np.uint8)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        offsets = (rows - self._starts[shards]) * self._bytes
        flat = out.reshape(len(rows), self._bytes)
        for place, (shard, offset) in enumerate(zip(shards.tolist(), offsets.tolist(), strict=True)):
            flat[place] = np.frombuffer(self._at(shard, offset), dtype=np.uint8)
        return out

    def _at(self, shard: int, offset: int) -> bytes:
        path = self.manifest.shards[shard].file(self.folder, "images")
        try:
            if shard not in self._files:
                self._files[shard] = descriptor = os.open(path, os.O_RDONLY)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            content = os.pread(self._files[shard], self._bytes, offset)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        if len(content) != self._bytes:
            raise DataError(f"{path}: ends inside the image at byte {offset:,}; it was whole when it was opened")
        return content

    def identity(self, class_names: tuple[str, ...], num_classes: int) -> DataIdentity:
        """Return which images these are, for a run whose data set has these classes."""
        counts = tuple(self.manifest.counts.get(label, 0) for label in range(num_classes))
        return DataIdentity(
            dataset="extra images", part="extra", classes=class_names, counts=counts, content=self.manifest.digest
        )

    def close(self) -> None:
        """Close the shards; reading afterwards opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])


def changed_shards(folder: Path, manifest: Manifest, *, every_byte: bool = False) -> dict[str, str]:
    """Return file name -> what is wrong with it: absent, another size, other bytes at the ends (or, if asked, anywhere)."""
    wrong: dict[str, str] = {}
    for shard in manifest.shards:
        sizes = {"images": manifest.image_size**2 * 3, "labels": LABEL.itemsize, "scores": SCORE.itemsize}
        reasons = {}
        for kind in _kinds(manifest.scored):
            path, size = shard.file(folder, kind), sizes[kind] * shard.images
            if path.is_symlink() or not path.is_file():
                reasons[path.name] = "the file is absent or no plain file"
            elif path.stat().st_size != size:
                reasons[path.name] = f"has {path.stat().st_size:,} bytes, had {size:,} when it was packed"
        if not reasons:
            name = shard.file(folder, "images").name
            if _ends(shard, folder, manifest.scored) != shard.ends:
                reasons[name] = "its bytes, or its labels or scores, are not those that were packed"
            elif every_byte and describe_shard(folder, shard.number, scored=manifest.scored) != shard:
                reasons[name] = "its bytes are not those that were packed"
        wrong |= reasons
    return wrong
