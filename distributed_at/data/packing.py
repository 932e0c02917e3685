"""Packs files of extra images into a folder that training reads image by image (``packed.py``), once, and resumably."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from distributed_at.data.extra_files import MOST_CLASSES, UNLABELLED, open_extra_file
from distributed_at.data.index import Progress
from distributed_at.data.locks import folder_lock
from distributed_at.data.packed import (
    FORMAT,
    JOURNAL,
    LABEL,
    MANIFEST,
    SCORE,
    Manifest,
    Shard,
    changed_shards,
    describe_shard,
    read_manifest,
)
from distributed_at.errors import ConfigError, DataError
from distributed_at.files import sync_folder, write_atomically

SHARD_BYTES = 1 << 30

Scored = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # images, labels, scores


_OURS = re.compile(r"\.lock|\.?(images|labels|scores)-\d{5}\.bin(\.part)?|\.?(extra|packing)\.json[.0-9a-f]*")


def pack_extra(
    files: Sequence[str | Path],
    folder: str | Path,
    *,
    num_classes: int = MOST_CLASSES,
    replace: bool = False,
    shard_images: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Pack files, in their order, into ``folder``; return its table. A call after a kill goes on where that one stopped.

    Where the folder holds the same files already (by path, size and time of change), nothing is done.

    Args:
        files: pickles or ``.npz`` archives.
        folder: made if need be. One process at a time packs into it; the others wait.
        num_classes: labels lie in [0, num_classes), or are all -1.
        replace: a set of other files in the folder gives way.
        shard_images: images of a shard; null = 1 GiB of them.
        progress: called with (images done, images in all).

    Raises:
        DataError: a file is not what it should be, or they do not belong together.
        ConfigError: the folder holds something else.
    """
    folder = Path(folder)
    if not files:
        raise ConfigError("no file of extra images was named")
    sources = [fingerprint(Path(path)) for path in files]
    with claimed(folder):
        if (held := held_set(folder, sources, replace=replace)) is not None:
            require_labels_below(held, num_classes, folder)
            return held
        opened = [open_extra_file(path) for path in files]
        sizes = {file.image_size for file in opened}
        if len(sizes) > 1:
            told = ", ".join(f"{file.path} {file.image_size}" for file in opened)
            raise DataError(f"extra images of a set are of one size, and these are not (pixels): {told}")

        def rows_from(first: int) -> Iterator[Scored]:
            for file in opened:
                if first < file.images:
                    for images, labels in file.pieces(num_classes=num_classes, first=first):
                        yield images, labels, None
                first = max(0, first - file.images)

        packer = Packer(folder, image_size=sizes.pop(), scored=False, sources=sources, shard_images=shard_images)
        return packer.pack(rows_from, sum(file.images for file in opened), progress=progress)


def fingerprint(path: Path) -> dict[str, Any]:
    """Return by what a file that has changed is told.

    Raises:
        DataError: it is not there.
    """
    try:
        facts = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return {"path": str(path.resolve()), "bytes": facts.st_size, "changed_ns": facts.st_mtime_ns}


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make a folder for a packed set and hold it; other processes of the machine wait.

    Raises:
        ConfigError: it cannot be made, or holds something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = sorted(p.name for p in folder.iterdir() if not _OURS.fullmatch(p.name))
        lock = folder_lock(folder / ".lock")
        if not strangers:
            lock.__enter__()
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to: {error.strerror or error}") from None
    if strangers:
        raise ConfigError(
            f"{folder}: holds {', '.join(strangers[:4])}, which is no part of a packed set: give a folder of its own"
        )
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def held_set(folder: Path, sources: Sequence[Mapping[str, Any]], *, replace: bool) -> Manifest | None:
    """Return the table of the set in a folder where it is one of these sources; None where there is none to keep.

    Raises:
        ConfigError: it is one of others, and may not be replaced.
    """
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_manifest(folder)
    if list(manifest.sources) == list(sources) and not changed_shards(folder, manifest):
        (folder / JOURNAL).unlink(missing_ok=True)  # of a packing that was killed after its last word
        return manifest
    if not replace:
        raise ConfigError(
            f"{folder}: holds a set packed from other files, or from these before they changed "
            f"({', '.join(str(source.get('path')) for source in manifest.sources[:3])}): remove it, or give another folder"
        )
    return None


def require_labels_below(manifest: Manifest, num_classes: int, folder: Path) -> None:
    """Refuse a set of more classes.

    Raises:
        DataError: a label is past the classes.
    """
    past = [label for label in manifest.counts if label >= num_classes]
    if past:
        raise DataError(
            f"{folder}: {manifest.counts[past[0]]:,} of its images have label {past[0]}; labels lie in [0, {num_classes})"
        )


class Packer:
    """Writes a packed set shard by shard; what is finished stands in a journal, from which a later call goes on."""

    def __init__(
        self,
        folder: Path,
        *,
        image_size: int,
        scored: bool,
        sources: Sequence[Mapping[str, Any]],
        made_by: Mapping[str, Any] | None = None,
        shard_images: int | None = None,
    ) -> None:
        """Describe the set; ``folder`` is ``claimed``."""
        self._folder, self._size, self._scored = folder, image_size, scored
        self._each = shard_images or max(1, SHARD_BYTES // (image_size**2 * 3))
        self._facts: dict[str, Any] = {
            "format": FORMAT,
            "image_size": image_size,
            "scored": scored,
            "shard_images": self._each,
            "sources": list(sources),
            "made_by": made_by,
        }
        self._shards: list[Shard] = []
        self._counts: Counter[int] = Counter()

    def pack(
        self, rows_from: Callable[[int], Iterator[Scored]], total: int, *, progress: Progress | None = None
    ) -> Manifest:
        """Write what ``rows_from(first image)`` yields, ``total`` images in all, and return the table.

        Raises:
            DataError: some images have a label and others have none, or the disk is full.
        """
        self._begin()
        done = sum(shard.images for shard in self._shards)
        pieces = _Buffered(rows_from(done))
        try:
            while done < total:
                count = min(self._each, total - done)
                self._write(pieces, count, lambda of_shard: None if progress is None else progress(of_shard, total))
                done += count
            write_atomically(self._folder / MANIFEST, self._manifest().to_json())
        except OSError as error:
            raise DataError(f"{self._folder}: cannot be written: {error.strerror or error}") from None
        (self._folder / JOURNAL).unlink()
        return self._manifest()

    def _manifest(self) -> Manifest:
        return Manifest(
            image_size=self._size,
            counts=dict(self._counts),
            scored=self._scored,
            shards=tuple(self._shards),
            sources=tuple(self._facts["sources"]),
            made_by=self._facts["made_by"],
        )

    def _begin(self) -> None:
        """Take up what an interrupted packing of the same files has finished; else make the folder empty."""
        journal = self._folder / JOURNAL
        try:
            held = json.loads(journal.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            held = {}
        if held.get("facts") == json.loads(json.dumps(self._facts)):
            self._shards = [Shard(**shard) for shard in held["shards"]]
            self._counts = Counter({int(label): count for label, count in held["counts"].items()})
            if not changed_shards(self._folder, self._manifest()):
                return
        self._shards, self._counts = [], Counter()
        (self._folder / MANIFEST).unlink(missing_ok=True)  # first: from here on the folder is not whole
        sync_folder(self._folder)
        for path in self._folder.iterdir():
            if path.name != ".lock":
                path.unlink()
        self._note()

    def _note(self) -> None:
        content = {"facts": self._facts, "shards": [vars(shard) for shard in self._shards], "counts": self._counts}
        write_atomically(self._folder / JOURNAL, json.dumps(content))

    def _write(self, pieces: _Buffered, count: int, tell: Callable[[int], None]) -> None:
        number, done = len(self._shards), sum(shard.images for shard in self._shards)
        shard = Shard(number=number, images=count, digest="", ends="")
        kinds = ("images", "labels", "scores") if self._scored else ("images", "labels")
        parts = {kind: shard.file(self._folder, kind).with_suffix(".bin.part") for kind in kinds}
        counts: Counter[int] = Counter()
        with ExitStack() as stack:
            files = {kind: stack.enter_context(open(path, "wb")) for kind, path in parts.items()}
            for images, labels, scores in pieces.take(count):
                files["images"].write(images.tobytes())
                files["labels"].write(labels.astype(LABEL).tobytes())
                if self._scored:
                    assert scores is not None
                    files["scores"].write(scores.astype(SCORE).tobytes())
                counts.update(dict(zip(*(c.tolist() for c in np.unique(labels, return_counts=True)), strict=True)))
                done += len(labels)
                tell(done)
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        self._counts.update(counts)
        if UNLABELLED in self._counts and len(self._counts) > 1:
            bare = self._counts[UNLABELLED]
            raise DataError(
                f"{bare:,} of the first {sum(self._counts.values()):,} images have no label (-1) and the others have one: "
                "either all images of a set have a label or none has"
            )
        for kind, path in parts.items():
            os.replace(path, shard.file(self._folder, kind))
        sync_folder(self._folder)
        self._shards.append(describe_shard(self._folder, number, scored=self._scored))
        self._note()


class _Buffered:
    """Cuts what an iterator yields at any number of images."""

    def __init__(self, pieces: Iterator[Scored]) -> None:
        self._pieces = pieces
        self._rest: Scored | None = None

    def take(self, count: int) -> Iterator[Scored]:
        """Yield pieces of ``count`` images together."""
        while count:
            images, labels, scores = self._rest if self._rest is not None else next(self._pieces)
            used = min(count, len(labels))
            left = used < len(labels)
            self._rest = (images[used:], labels[used:], None if scores is None else scores[used:]) if left else None
            yield images[:used], labels[:used], None if scores is None else scores[:used]
            count -= used
