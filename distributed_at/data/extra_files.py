"""Reads files of extra images in the two forms that the field publishes them in, piece by piece. Nothing in a file is run.

The pickle of Carmon et al. 2019 ("Unlabeled data improves adversarial robustness"; 500K of Tiny Images) is a dictionary
of ``data`` and ``extrapolated_targets``; the archives of Rebuffi et al. 2021 and Wang et al. 2023 (generated images) are
``.npz`` files of ``image`` and ``label``. An archive is never in memory as a whole; a pickle is, since its format cannot
be read otherwise.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from distributed_at.data.safe_pickle import load_data_pickle
from distributed_at.errors import DataError

PICKLE_KEYS = ("data", "extrapolated_targets")
NPZ_KEYS = ("image", "label")
MOST_CLASSES = 1000
UNLABELLED = -1
ROWS = 4096  # images of a piece
_ZIP_MAGIC = b"PK\x03\x04"
_MOST_EXPANSION = 100  # unpacked over packed bytes; photographs reach 2, deflate itself 1032
_READ = 1 << 22  # bytes that are skipped at once

Piece = tuple[np.ndarray, np.ndarray]  # (n, H, H, 3) uint8 and (n,) int64


@dataclass(frozen=True, kw_only=True)
class ExtraFile:
    """A file of extra images whose keys, shapes and types are right; its labels are checked as they are read.

    Attributes:
        path: of the file.
        images: their number.
        image_size: height and width.
        has_labels: False where labels were not asked for and are not there; they then read as ``UNLABELLED``.
    """

    path: Path
    images: int
    image_size: int
    has_labels: bool
    keys: tuple[str, str]
    arrays: Piece | None  # of a pickle

    def pieces(self, *, num_classes: int = MOST_CLASSES, first: int = 0) -> Iterator[Piece]:
        """Yield images and labels from image ``first`` on, at most ``ROWS`` at a time.

        Labels lie in [0, num_classes), or are all ``UNLABELLED``.

        Raises:
            DataError: a label out of range, some images without a label beside others with one, or a damaged file.
        """
        source = self._stored(first) if self.arrays is None else self._held(self.arrays, first)
        place, bare = first, None
        for images, labels in source:
            bare = bool(labels[0] == UNLABELLED) if bare is None else bare
            self._check_labels(labels, place, num_classes, bare)
            place += len(labels)
            yield images, labels

    def images_alone(self, first: int = 0) -> Iterator[np.ndarray]:
        """Yield images as ``pieces`` does, whatever their labels are."""
        for images, _ in self._stored(first) if self.arrays is None else self._held(self.arrays, first):
            yield images

    def _check_labels(self, labels: np.ndarray, first: int, num_classes: int, bare: bool) -> None:
        wrong = ((labels < 0) & (labels != UNLABELLED)) | (labels >= num_classes)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                f"{self.path}: '{self.keys[1]}' of image {first + at} is {labels[at]}; labels lie in [0, {num_classes}), or are "
                f"all {UNLABELLED} for images without one"
            )
        other = (labels == UNLABELLED) != bare
        if other.any():
            at = int(np.argmax(other))
            raise DataError(
                f"{self.path}: '{self.keys[1]}' of image {first + at} is {labels[at]}, and images before it have "
                f"{'no label (-1)' if bare else 'a label'}: either all images of a set have one or none has"
            )

    def _held(self, arrays: Piece, first: int) -> Iterator[Piece]:
        images, labels = arrays
        for start in range(first, self.images, ROWS):
            yield np.ascontiguousarray(images[start : start + ROWS]), labels[start : start + ROWS].astype(np.int64)

    def _stored(self, first: int) -> Iterator[Piece]:
        with _archive(self.path) as archive, ExitStack() as stack:
            open_keys = self.keys if self.has_labels else self.keys[:1]
            streams = [stack.enter_context(archive.open(f"{key}.npy")) for key in open_keys]
            kinds = [_header(stream)[1] for stream in streams]
            shapes = [(self.image_size, self.image_size, 3), ()]
            for stream, kind, shape in zip(streams, kinds, shapes, strict=False):
                _skip(stream, first * kind.itemsize * math.prod(shape))
            for start in range(first, self.images, ROWS):
                rows = min(ROWS, self.images - start)
                found = [
                    _rows(stream, kind, (rows, *shape))
                    for stream, kind, shape in zip(streams, kinds, shapes, strict=False)
                ]
                labels = found[1].astype(np.int64) if self.has_labels else np.full(rows, UNLABELLED, dtype=np.int64)
                yield found[0], labels


class _archive:
    """An archive, whose damage is told as a DataError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> zipfile.ZipFile:
        try:
            self._file = zipfile.ZipFile(self._path)
        except Exception as error:  # a malformed archive raises almost any type
            raise self._told(error) from None
        return self._file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._file.close()
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise self._told(error) from None

    def _told(self, error: Exception) -> DataError:
        return DataError(f"{self._path}: not a whole .npz archive ({type(error).__name__}: {error}). Get it again.")


def open_extra_file(path: str | Path, *, need_labels: bool = True) -> ExtraFile:
    """Look at a file of extra images: a pickle or an ``.npz`` archive; which one is told by its content.

    Raises:
        DataError: an absent, damaged or hostile file, other keys, shapes or types, or sizes that the file's own bytes
            cannot hold (found before memory is taken).
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            is_archive = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return _look_at_archive(path, need_labels) if is_archive else _look_at_pickle(path, need_labels)


def _look_at_pickle(path: Path, need_labels: bool) -> ExtraFile:
    content = load_data_pickle(path)
    has_labels = need_labels or PICKLE_KEYS[1] in content
    wanted = PICKLE_KEYS if has_labels else PICKLE_KEYS[:1]
    _check_keys(path, [str(key) for key in content], wanted)
    arrays = [content[key] for key in wanted]
    for key, value in zip(wanted, arrays, strict=True):
        if not isinstance(value, np.ndarray):
            raise DataError(f"{path}: {key!r} must be a numpy array, found {type(value).__name__}")
    labels = arrays[1] if has_labels else np.full(len(arrays[0]), UNLABELLED)
    _check_shapes(path, PICKLE_KEYS, (arrays[0].shape, arrays[0].dtype), (labels.shape, labels.dtype))
    return ExtraFile(
        path=path, images=len(labels), image_size=arrays[0].shape[1], has_labels=has_labels, keys=PICKLE_KEYS,
        arrays=(arrays[0], labels),
    )  # fmt: skip


def _look_at_archive(path: Path, need_labels: bool) -> ExtraFile:
    with _archive(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        has_labels = need_labels or NPZ_KEYS[1] in names
        wanted = NPZ_KEYS if has_labels else NPZ_KEYS[:1]
        _check_keys(path, names, wanted)
        held = [_look_at_member(path, archive, key) for key in wanted]
    images = held[0]
    labels = held[1] if has_labels else (images[0][:1], np.dtype(np.int64))
    _check_shapes(path, NPZ_KEYS, images, labels)
    return ExtraFile(
        path=path, images=images[0][0], image_size=images[0][1], has_labels=has_labels, keys=NPZ_KEYS, arrays=None
    )


def _check_keys(path: Path, found: list[str], wanted: tuple[str, ...]) -> None:
    missing = [key for key in wanted if key not in found]
    if missing:
        raise DataError(
            f"{path}: holds no {' and no '.join(map(repr, missing))}; extra images are a pickle of "
            f"{' and '.join(map(repr, PICKLE_KEYS))} or an .npz of {' and '.join(map(repr, NPZ_KEYS))}, "
            f"and this file holds {', '.join(map(repr, sorted(found)[:8])) or 'nothing'}"
        )


_Described = tuple[tuple[int, ...], np.dtype]


def _check_shapes(path: Path, keys: tuple[str, str], images: _Described, labels: _Described) -> None:
    (shape, kind), (label_shape, label_kind) = images, labels
    square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
    if kind != np.uint8 or not square or 0 in shape:
        raise DataError(f"{path}: '{keys[0]}' must be uint8 (N, H, H, 3), found {kind} {shape}")
    if label_kind.kind not in "iu" or label_shape != shape[:1]:
        raise DataError(
            f"{path}: '{keys[1]}' must be {shape[0]} integers, one per image, found {label_kind} {label_shape}"
        )


def _look_at_member(path: Path, archive: zipfile.ZipFile, key: str) -> _Described:
    """Return shape and type of one array after its header was held against the bytes that are really there."""
    entry = archive.getinfo(f"{key}.npy")
    held = path.stat().st_size
    if entry.compress_size > held or entry.file_size > _MOST_EXPANSION * max(entry.compress_size, 1):
        raise DataError(
            f"{path}: {key!r} would unpack {entry.compress_size:,} bytes to {entry.file_size:,}; images do not, so this "
            "file is refused before it fills the memory"
        )
    with archive.open(entry) as stream:
        shape, kind, by_columns = _full_header(stream)
        promised = stream.tell() + math.prod(shape) * kind.itemsize
    if kind.hasobject:
        raise DataError(f"{path}: {key!r} holds Python objects, which can run code when they are read; nothing was run")
    if promised != entry.file_size:
        raise DataError(f"{path}: {key!r} says {kind} {shape}, {promised:,} bytes, and holds {entry.file_size:,}")
    if by_columns and len(shape) > 1:
        raise DataError(
            f"{path}: {key!r} lies in Fortran's order, of which no image can be read alone: save it again after "
            "numpy.ascontiguousarray"
        )
    return shape, kind


def _full_header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    """Return (shape, dtype, whether in Fortran's order) of an array in numpy's format, reading no more than its header."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, kind = read(stream)
    return shape, kind, by_columns


def _header(stream: IO[bytes]) -> _Described:
    shape, kind, _ = _full_header(stream)
    return shape, kind


def _skip(stream: IO[bytes], count: int) -> None:
    """Read over ``count`` bytes, so that the archive's checksum, compared with the last byte, covers them too."""
    while count > 0:
        read = len(stream.read(min(count, _READ)))
        if not read:
            raise EOFError("it ends inside an array")
        count -= read


def _rows(stream: IO[bytes], kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Read (rows, ...) values in native byte order."""
    wanted = math.prod(shape) * kind.itemsize
    content = bytearray(wanted)
    view, done = memoryview(content), 0
    while done < wanted:
        read = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not read:
            raise EOFError("it ends inside an array")
        done += read
    return np.frombuffer(content, dtype=kind).reshape(shape).astype(kind.newbyteorder("="), copy=False)
