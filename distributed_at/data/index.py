"""The index of a folder of class folders: every file's label and dimensions, and which files cannot be used.

Crop windows are computed before decoding and need the dimensions; and training must not stop on day two at a damaged
file that could be known on day one. Ids are places in the sorted listing, damaged files included, so that an id never
depends on the state of other files.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distributed_at.data.inspection import Inspection, damage, fingerprint, inspect_file
from distributed_at.data.locks import folder_lock
from distributed_at.data.machine import decoder_threads
from distributed_at.data.shard_table import ShardTable
from distributed_at.errors import DataError

INDEX_NAME = ".distributed_at_index.npz"
IMAGE_SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp", ".bmp"})
_FORMAT = 2
_CHUNK = 512
SAMPLED = 2000  # files that are looked at when an index is opened
Progress = Callable[[int, int], None]


class OtherFormatError(DataError):
    """An index that another version of this package wrote; it can be made again."""


@dataclass(frozen=True, kw_only=True)
class FolderIndex:
    """What is known of a folder ``root/<class>/<image>``.

    Attributes:
        root: the folder.
        class_names: sorted names of the class folders; a label is a place in it.
        paths: N paths relative to ``root``, sorted; an id is a place in it.
        labels: (N,) int64.
        heights: (N,) int32, pixels as stored (EXIF rotation is not applied); 0 for files set aside.
        widths: (N,) int32.
        byte_sizes: (N,) int64.
        set_aside: id -> why the file cannot be used.
        verified: every file was decoded in full, not only its header.
        checksum: SHA-256 of the listing.
        fingerprints: (N,) uint64 of the files (``inspection.fingerprint``).
        shards: where the bytes lie if ``root`` holds tar shards (``shards.py``); None = files.
        digests: SHA-256 of each file where this process decoded all of them; not kept in the file.
    """

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[str, ...]
    labels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    byte_sizes: np.ndarray
    set_aside: dict[int, str]
    verified: bool
    checksum: str
    fingerprints: np.ndarray
    shards: ShardTable | None = None
    digests: tuple[bytes, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def content(self) -> str:
        """SHA-256 over the listing and the fingerprints of all files: which data these are."""
        digest = hashlib.sha256(self.checksum.encode())
        digest.update(self.fingerprints.astype("<u8").tobytes())
        return digest.hexdigest()

    def encoded(self, sample_id: int) -> np.ndarray:
        """Return an image's file, (bytes,) uint8; OSError where it cannot be read."""
        if self.shards is not None:
            return self.shards.read(sample_id)
        return np.fromfile(self.root / self.paths[sample_id], dtype=np.uint8)

    def place(self, sample_id: int) -> str:
        """Return where an image's bytes are, for messages."""
        if self.shards is not None:
            return f"{self.shards.place(sample_id)} ({self.paths[sample_id]})"
        return str(self.root / self.paths[sample_id])

    def close(self) -> None:
        """Close what is open; reading opens it again."""
        if self.shards is not None:
            self.shards.close()


def list_folder(folder: Path) -> list[str]:
    """Return the sorted relative paths ``<class>/<image>`` of a folder; hidden and other files are not images.

    Raises:
        DataError: the folder is absent, holds no class folders, or they hold no images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: looked for a folder of class folders (<wnid>/*.JPEG); there is no such folder")
    classes = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    if not classes:
        loose = sum(Path(e.name).suffix.lower() in IMAGE_SUFFIXES for e in os.scandir(folder))
        fix = "move each image into the folder of its class" if loose else "check data.path"
        raise DataError(f"{folder}: looked for class folders (<wnid>/), found none and {loose} loose images; {fix}")
    paths = [
        f"{name}/{entry.name}"
        for name in classes
        for entry in sorted(os.scandir(folder / name), key=lambda e: e.name)
        if not entry.name.startswith(".") and os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
    ]
    if not paths:
        raise DataError(f"{folder}: {len(classes)} class folders, but no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return paths


def listing_checksum(paths: Iterable[str]) -> str:
    """Return the SHA-256 of a sorted listing."""
    return hashlib.sha256("\0".join(paths).encode("utf-8", "surrogateescape")).hexdigest()


def index_path(folder: Path, cache: Path | None = None) -> Path:
    """Return where the index of ``folder`` is kept: ``cache`` if given, the folder itself, or the user's cache."""
    if cache is not None:
        return cache
    inside = folder / INDEX_NAME
    if inside.exists() or os.access(folder, os.W_OK):
        return inside
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distributed_at"
    return base / f"index-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.npz"


def survey(
    folder: str | Path, *, num_threads: int = 0, verify: bool = False, progress: Progress | None = None
) -> FolderIndex:
    """Inspect every image of ``folder`` and return what an index would hold; nothing is written.

    Args:
        folder: holds one folder a class.
        num_threads: files inspected at once; 0 = by the machine.
        verify: decode every file in full, which also finds files cut short; else read headers alone.
        progress: called with (files done, files in all).

    Raises:
        DataError: absent folder or wrong layout.
    """
    folder = Path(folder)
    paths = list_folder(folder)
    class_names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
    label_of = {name: label for label, name in enumerate(class_names)}
    found: list[Inspection] = []
    with ThreadPoolExecutor(num_threads or 2 * decoder_threads()) as pool:
        for start in range(0, len(paths), _CHUNK):
            chunk = paths[start : start + _CHUNK]
            found.extend(pool.map(lambda path: inspect_file(folder / path, verify=verify), chunk))
            if progress is not None:
                progress(len(found), len(paths))
    return FolderIndex(
        root=folder,
        class_names=tuple(class_names),
        paths=tuple(paths),
        labels=np.array([label_of[path.split("/", 1)[0]] for path in paths], dtype=np.int64),
        heights=np.array([f.height for f in found], dtype=np.int32),
        widths=np.array([f.width for f in found], dtype=np.int32),
        byte_sizes=np.array([f.byte_size for f in found], dtype=np.int64),
        set_aside={i: f.reason for i, f in enumerate(found) if f.reason},
        verified=verify,
        checksum=listing_checksum(paths),
        fingerprints=np.array([f.fingerprint for f in found], dtype=np.uint64),
        digests=tuple(f.digest for f in found) if verify else (),
    )


def write_index(index: FolderIndex, *, cache: str | Path | None = None) -> None:
    """Write an index where runs look for it, replacing an older one whole or not at all."""
    _write(index, index_path(index.root, Path(cache) if cache is not None else None))


def build_index(
    folder: str | Path,
    *,
    cache: str | Path | None = None,
    num_threads: int = 0,
    verify: bool = False,
    progress: Progress | None = None,
) -> FolderIndex:
    """Survey ``folder`` and write the index; arguments and errors are those of ``survey``.

    ``cache`` is the file to keep it in; None = in the folder, or in the user's cache where that is read-only.
    """
    index = survey(folder, num_threads=num_threads, verify=verify, progress=progress)
    write_index(index, cache=cache)
    return index


def pack_texts(texts: Iterable[str]) -> np.ndarray:
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def unpack_texts(values: np.ndarray) -> tuple[str, ...]:
    return tuple(values.tobytes().decode("utf-8", "surrogateescape").split("\0")) if values.size else ()


def _write(index: FolderIndex, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                format=np.int64(_FORMAT),
                class_names=pack_texts(index.class_names),
                paths=pack_texts(index.paths),
                labels=index.labels,
                heights=index.heights,
                widths=index.widths,
                byte_sizes=index.byte_sizes,
                aside_ids=np.array(list(index.set_aside), dtype=np.int64),
                aside_reasons=pack_texts(reason.replace("\0", " ") for reason in index.set_aside.values()),
                verified=np.bool_(index.verified),
                checksum=pack_texts([index.checksum]),
                fingerprints=index.fingerprints,
            )
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # others on the machine read it too
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def read_index(folder: str | Path, *, cache: str | Path | None = None) -> FolderIndex:
    """Read an index as it was written, whether or not it still describes ``folder``.

    Raises:
        DataError: no index, or one that cannot be read.
    """
    folder = Path(folder)
    target = index_path(folder, Path(cache) if cache is not None else None)
    try:
        with np.load(target, allow_pickle=False) as content:
            if int(content["format"]) != _FORMAT:
                raise OtherFormatError(
                    f"{target}: index format {int(content['format'])}, this version reads {_FORMAT}. {_fix(target)}"
                )
            return FolderIndex(
                root=folder,
                class_names=unpack_texts(content["class_names"]),
                paths=unpack_texts(content["paths"]),
                labels=content["labels"],
                heights=content["heights"],
                widths=content["widths"],
                byte_sizes=content["byte_sizes"],
                set_aside=dict(zip(content["aside_ids"].tolist(), unpack_texts(content["aside_reasons"]), strict=True)),
                verified=bool(content["verified"]),
                checksum=unpack_texts(content["checksum"])[0],
                fingerprints=content["fingerprints"],
            )
    except FileNotFoundError:
        raise DataError(f"{target}: there is no index of {folder}. Run build_index.") from None
    except DataError:
        raise
    except Exception as error:  # a damaged archive raises many types
        raise DataError(
            f"{target}: the index cannot be read ({type(error).__name__}: {error}). {_fix(target)}"
        ) from None


def _fix(target: Path) -> str:
    return f"Delete {target} (it is made again), or run 'distributed-at data index'."


def listing_changes(before: Iterable[str], now: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the sorted paths that are gone and those that are new."""
    return sorted(set(before) - set(now)), sorted(set(now) - set(before))


def load_index(folder: str | Path, *, cache: str | Path | None = None) -> FolderIndex:
    """Read an index and check that it still describes ``folder``.

    Raises:
        DataError: no index, one that cannot be read, or one of another listing; the message says what changed.
    """
    folder = Path(folder)
    index = read_index(folder, cache=cache)
    now = list_folder(folder)
    if listing_checksum(now) != index.checksum:
        gone, new = listing_changes(index.paths, now)
        changes = [f"{len(gone)} files gone (e.g. {gone[0]})"] if gone else []
        changes += [f"{len(new)} files new (e.g. {new[0]})"] if new else []
        raise DataError(
            f"{folder}: the folder is not the one that was indexed: {', '.join(changes)}. Ids are places in the listing, "
            f"so runs on the two are not comparable. Restore the folder, or accept the change: "
            f"{_fix(index_path(folder, Path(cache) if cache is not None else None))}"
        )
    other = changed_file(index)
    if other is not None:
        raise DataError(
            f"{other}: is not the file that was indexed; its folder's index speaks of other images. Restore the folder, "
            f"or accept the change: {_fix(index_path(folder, Path(cache) if cache is not None else None))}"
        )
    return index


def changed_file(index: FolderIndex) -> Path | None:
    """Return a file that holds another image than the indexed one, of all files or of ``SAMPLED`` evenly spread ones.

    A file that was damaged since is none: training replaces it, evaluation names it.
    """
    places = np.unique(np.linspace(0, len(index) - 1, min(len(index), SAMPLED)).astype(np.int64)).tolist()
    chosen = [place for place in places if place not in index.set_aside]

    def unchanged(place: int) -> bool:
        try:
            with open(index.root / index.paths[place], "rb") as file:
                same = fingerprint(file, os.fstat(file.fileno()).st_size) == int(index.fingerprints[place])
                file.seek(0)
                return same or bool(damage(file.read()))
        except OSError:  # told with its reason by who reads it
            return True

    with ThreadPoolExecutor(2 * decoder_threads()) as pool:
        for place, is_same in zip(chosen, pool.map(unchanged, chosen), strict=True):
            if not is_same:
                return index.root / index.paths[place]
    return None


def open_index(
    folder: str | Path, *, cache: str | Path | None = None, num_threads: int = 0, progress: Progress | None = None
) -> FolderIndex:
    """Load the index of ``folder``, building it first where there is none; one process of a machine builds.

    Raises:
        DataError: as ``load_index`` and ``build_index``.
    """
    folder = Path(folder)
    target = index_path(folder, Path(cache) if cache is not None else None)
    if not target.exists() or _outdated(folder, cache):
        list_folder(folder)  # an absent folder is reported as such, not as a lock that cannot be made
        target.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(target.with_name(target.name + ".lock")):
            if not target.exists() or _outdated(folder, cache):
                return build_index(folder, cache=cache, num_threads=num_threads, progress=progress)
    return load_index(folder, cache=cache)


def _outdated(folder: Path, cache: str | Path | None) -> bool:
    """Whether an index is of an earlier version, which did not keep what this one asks."""
    try:
        read_index(folder, cache=cache)
    except OtherFormatError:
        return True
    except DataError:  # told by whoever loads it
        return False
    return False
