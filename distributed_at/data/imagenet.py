"""ImageNet-style folders: reads files, computes views from counters, decodes, and replaces images that are damaged.

A damaged training image is replaced by the next image of the listing that is in the same split and readable. Which
image that is depends on the index, the files and the view alone, never on what this process met before: DALI decodes a
damaged file as long as the window avoids the damage, so remembering would make a resumed run differ. Evaluation never
replaces: files that the index set aside are no part of the split, and any other damaged file is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from distributed_at.config import AugmentConfig
from distributed_at.config.data import ResizeFilter
from distributed_at.data.augment import Views, centre_views, training_views
from distributed_at.data.colour import jitter_batch
from distributed_at.data.identity import DataIdentity, counted
from distributed_at.data.index import FolderIndex
from distributed_at.data.inspection import cut_short
from distributed_at.data.resample import FILTERS
from distributed_at.data.source import ImageSource, require_members
from distributed_at.errors import DataError

Warn = Callable[[str, str], None]
_READ_TRIES = 3
_RETRY_SECONDS = 0.2
FAILURE_SHARE = 1000  # one damaged image in so many is tolerated, and always FAILURE_FLOOR
FAILURE_FLOOR = 10


class Decoder(Protocol):
    """What a backend offers."""

    name: str

    def decode(self, encoded: Sequence[np.ndarray], views: Views) -> tuple[torch.Tensor, dict[int, str]]:
        """Return (N, size, size, 3) uint8 and position -> reason for images that cannot be decoded."""
        ...

    def describe(self) -> str: ...

    def close(self) -> None: ...


class FolderSource(ImageSource):
    """A split of a folder of class folders."""

    def __init__(
        self,
        index: FolderIndex,
        decoder: Decoder,
        *,
        name: str,
        split: str,
        sample_ids: np.ndarray,
        image_size: int,
        resize_size: int,
        augment: AugmentConfig,
        seed: int,
        num_threads: int,
        resize: ResizeFilter = "antialiased",
        warn: Warn | None = None,
    ) -> None:
        """Wrap an index and a decoder.

        Args:
            index: of the folder; its places are the ids.
            decoder: DALI's or Pillow's.
            name: the data set.
            split: 'train', 'validation' or 'test'.
            sample_ids: (N,) int64 ids of this split; files set aside leave the split unless it is 'train'.
            image_size: pixels.
            resize_size: shortest edge before the centre crop, pixels.
            augment: training views.
            seed: the run's seed.
            num_threads: files read at once.
            resize: the decoder's kernel, which the protocols name.
            warn: called with (code, message) once for each damaged file.

        Raises:
            DataError: more files are damaged than is tolerated.
        """
        if split != "train":
            sample_ids = np.array([i for i in sample_ids.tolist() if i not in index.set_aside], dtype=np.int64)
        super().__init__(
            name=name,
            split=split,
            sample_ids=sample_ids,
            num_classes=len(index.class_names),
            image_size=image_size,
            seed=seed,
            class_names=index.class_names,
        )
        self._index = index
        self._decoder = decoder
        self._resize_size = resize_size
        self._augment = augment
        self._resize = resize
        self._warn = warn
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read")
        self._damaged: dict[int, str] = {}
        self.failure_limit = max(FAILURE_FLOOR, len(sample_ids) // FAILURE_SHARE)
        if split == "train":
            members = set(sample_ids.tolist())
            for sample_id, reason in index.set_aside.items():
                if sample_id in members:
                    self._record(sample_id, reason)
        elif index.set_aside and warn is not None:
            warn("images_set_aside", f"{index.root}: {len(index.set_aside)} unreadable files are no part of '{split}'")

    @property
    def backend(self) -> str:
        """The decoder in use: 'dali_cpu', 'dali_gpu' or 'pil'."""
        return self._decoder.name

    @property
    def damaged(self) -> dict[int, str]:
        """Ids that were found damaged so far in this process, with reasons: a record that no later read looks at."""
        return dict(self._damaged)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Return the (N,) labels in the listing; ``read`` returns a substitute's own label with its image."""
        return self._index.labels[require_members(ids, self.sample_ids, split=self.split)]

    def read(
        self, ids: np.ndarray, *, epoch: int, train: bool, seed: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = require_members(ids, self.sample_ids, split=self.split)
        seed = self.seed if seed is None else seed
        if not train:
            for i in ids.tolist():
                if i in self._index.set_aside:
                    self._fail(i, self._index.set_aside[i], train=False)
        shown = np.array([self._usable(i) for i in ids.tolist()], dtype=np.int64)
        images, failures = self._decode(ids, shown, epoch=epoch, train=train, seed=seed)
        tries = 0
        while failures:
            places = np.array(sorted(failures), dtype=np.int64)
            for place in places.tolist():
                self._fail(int(shown[place]), failures[place], train=train)
            tries += 1
            if tries == self.num_samples:
                raise DataError(self._nothing_readable())
            shown[places] = [self._usable(self._next(i)) for i in shown[places].tolist()]
            again, reasons = self._decode(ids[places], shown[places], epoch=epoch, train=train, seed=seed)
            images[torch.from_numpy(places).to(images.device)] = again
            failures = {int(places[place]): reason for place, reason in reasons.items()}
        if train and self._augment.colour_jitter:
            jittered = jitter_batch(images.cpu().numpy(), ids, epoch=epoch, seed=seed, executor=self._pool)
            images = torch.from_numpy(jittered).to(images.device)
        return images.permute(0, 3, 1, 2), torch.from_numpy(self._index.labels[shown])

    def _decode(
        self, ids: np.ndarray, shown: np.ndarray, *, epoch: int, train: bool, seed: int
    ) -> tuple[torch.Tensor, dict[int, str]]:
        """Read and decode files ``shown`` with the counters of ``ids``; return images and position -> reason."""
        files = list(self._pool.map(self._read_file, shown.tolist()))
        heights, widths = self._index.heights[shown].astype(np.int64), self._index.widths[shown].astype(np.int64)
        if train:
            views = training_views(
                ids,
                heights,
                widths,
                epoch=epoch,
                seed=seed,
                augment=self._augment,
                size=self.image_size,
                shortest_edge=self._resize_size,
            )
        else:
            views = centre_views(heights, widths, shortest_edge=self._resize_size, size=self.image_size)
        failures = {i: file for i, file in enumerate(files) if isinstance(file, str)}
        if not failures:
            return self._decoder.decode([f for f in files if not isinstance(f, str)], views)
        good = np.array([i for i in range(len(files)) if i not in failures], dtype=np.int64)
        decoded, reasons = self._decoder.decode([f for f in files if not isinstance(f, str)], views.take(good))
        images = decoded.new_zeros((len(files), *decoded.shape[1:]))
        images[torch.from_numpy(good).to(decoded.device)] = decoded
        return images, failures | {int(good[place]): reason for place, reason in reasons.items()}

    def _read_file(self, sample_id: int) -> np.ndarray | str:
        """Return a file's bytes, or why it cannot be used; a file system's hiccup is tried again."""
        for attempt in range(_READ_TRIES):
            try:
                encoded = self._index.encoded(sample_id)
                break
            except FileNotFoundError:
                return "the file is gone"
            except OSError as error:
                if attempt + 1 == _READ_TRIES:
                    return f"cannot be read: {error.strerror or error}"
                time.sleep(_RETRY_SECONDS * 2**attempt)
        if len(encoded) != self._index.byte_sizes[sample_id]:
            return f"has {len(encoded)} bytes, had {self._index.byte_sizes[sample_id]} when it was indexed"
        return "cut short: a JPEG without its end" if cut_short(encoded.tobytes()) else encoded

    def _next(self, sample_id: int) -> int:
        place = int(np.searchsorted(self.sample_ids, sample_id))
        return int(self.sample_ids[(place + 1) % self.num_samples])

    def _usable(self, sample_id: int) -> int:
        """Return ``sample_id``, or the next id of this split that the index did not set aside."""
        for _ in range(self.num_samples):
            if sample_id not in self._index.set_aside:
                return sample_id
            sample_id = self._next(sample_id)
        raise DataError(self._nothing_readable())

    def _nothing_readable(self) -> str:
        return f"{self._index.root}: no image of the {self.split} split can be read"

    def _fail(self, sample_id: int, reason: str, *, train: bool) -> None:
        if not train:
            raise DataError(self._evaluation_message(sample_id, reason))
        self._record(sample_id, reason)

    def _record(self, sample_id: int, reason: str) -> None:
        if sample_id in self._damaged:
            return
        self._damaged[sample_id] = reason
        if self._warn is not None:
            place = self._index.place(sample_id)
            self._warn(
                "image_damaged", f"{place}: {reason}; the next readable image of the listing is shown in its place"
            )
        if len(self._damaged) > self.failure_limit:
            examples = ", ".join(f"{self._index.paths[i]} ({why})" for i, why in list(self._damaged.items())[:3])
            raise DataError(
                f"{self._index.root}: {len(self._damaged)} damaged images, more than the {self.failure_limit} that are "
                f"replaced: {examples}. Restore the files; 'distributed-at data verify {self._index.root}' lists them all."
            )

    def _evaluation_message(self, sample_id: int, reason: str) -> str:
        return (
            f"{self._index.place(sample_id)}: {reason}. An evaluation replaces no image: restore the "
            f"file, or set it aside openly: distributed-at data verify {self._index.root}"
        )

    def identity(self) -> DataIdentity:
        return replace(
            super().identity(),
            counts=counted(self._index.labels, self.num_classes),
            content=self._index.content,
        )

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "listing": self._index.checksum,
            "content": self._index.content,
            "resize_size": self._resize_size,
            "interpolation": FILTERS[self._resize],
            "decoder": self._decoder.describe(),
        }

    def close(self) -> None:
        self._decoder.close()
        self._pool.shutdown()
        self._index.close()


def check_layout(root: Path, split: str) -> None:
    """Check that ``root`` holds ``train/`` and ``val/``; the test images alone need ``val/`` alone.

    Raises:
        DataError: it does not; the message says what it holds.
    """
    if (root / "val").is_dir() and (split == "test" or (root / "train").is_dir()):
        return
    found = sorted(p.name for p in root.iterdir())[:8] if root.is_dir() else None
    state = "does not exist" if found is None else f"holds {found or 'nothing'}"
    raise DataError(
        f"data.path {root}: looked for train/<wnid>/*.JPEG and val/<wnid>/*.JPEG; the folder {state}. "
        f"Point data.path at the folder that holds both."
    )
