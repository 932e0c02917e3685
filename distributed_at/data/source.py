"""What every data set offers: ids, labels and ``read``; and the implementation for sets that fit in memory."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import torch

from distributed_at.config import AugmentConfig
from distributed_at.data.augment import pad_crop_flip
from distributed_at.data.colour import jitter_batch
from distributed_at.data.identity import DataIdentity, counted


class ImageSource(ABC):
    """One split of a data set.

    Attributes:
        name: the data set, as in ``data.dataset``.
        split: 'train', 'validation' or 'test'.
        sample_ids: (num_samples,) int64, sorted: the images of this split, numbered in the published split that they
            come from. Numbers never change with limits, held-out images or damaged files.
        num_classes: classes of the data set.
        class_names: their names, or empty.
        image_size: height and width of what ``read`` returns.
        seed: the run's seed, used where ``read`` is given none.
        unlabelled: images beside those of the data set have no label; they read as -1.
    """

    unlabelled: bool = False

    def __init__(
        self,
        *,
        name: str,
        split: str,
        sample_ids: np.ndarray,
        num_classes: int,
        image_size: int,
        seed: int,
        class_names: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.split = split
        self.sample_ids = np.asarray(sample_ids, dtype=np.int64)
        self.num_classes = num_classes
        self.image_size = image_size
        self.seed = seed
        self.class_names = class_names

    @property
    def num_samples(self) -> int:
        """Number of images in this split."""
        return len(self.sample_ids)

    def __len__(self) -> int:
        return self.num_samples

    @abstractmethod
    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Return the (N,) int64 labels of (N,) ids."""

    def origins(self, ids: np.ndarray) -> np.ndarray | None:
        """Return (N,) int8 of ``batch.LABELLED`` and ``batch.EXTRA``; None where all are of the data set itself."""
        return None

    def identities(self) -> dict[str, DataIdentity]:
        """Return part -> identity of all data that its images come from."""
        own = self.identity()
        return {own.part: own}

    @abstractmethod
    def read(
        self, ids: np.ndarray, *, epoch: int, train: bool, seed: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels.

        Args:
            ids: (N,) int64 out of ``sample_ids``.
            epoch: epoch of the augmentation's counters; unused when not ``train``.
            train: augmented views; else the evaluation view.
            seed: seed of the augmentation's counters; null = the seed that the split was opened with.

        Returns:
            (N, 3, H, W) uint8 in channels_last memory, and (N,) int64 labels.
        """

    def identity(self) -> DataIdentity:
        """Return which data these are, over the whole published split that the images come from."""
        return DataIdentity(
            dataset=self.name,
            part="test" if self.split == "test" else "train",
            classes=self.class_names,
            counts=counted(self.labels(self.sample_ids), self.num_classes),
            content=hashlib.sha256(self.sample_ids.astype("<i8").tobytes()).hexdigest(),
        )

    def describe(self) -> dict[str, Any]:
        """Return what an evaluation's protocol must record: data set, ids and every choice that moves a pixel."""
        return {
            "dataset": self.name,
            "split": self.split,
            "num_samples": self.num_samples,
            "ids": hashlib.sha256(self.sample_ids.astype("<i8").tobytes()).hexdigest(),
            "image_size": self.image_size,
        }

    def close(self) -> None:  # noqa: B027 - sources in memory hold nothing
        """Release threads and decoders; reading afterwards is an error for sources that have them."""

    def __enter__(self) -> ImageSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def require_members(ids: np.ndarray, sample_ids: np.ndarray, *, split: str) -> np.ndarray:
    """Return (N,) ids as int64 after checking that each belongs to ``sample_ids`` (sorted).

    Raises:
        ValueError: an id of another split: reading held-out images by mistake must not go unnoticed.
    """
    ids = np.asarray(ids, dtype=np.int64)
    if ids.ndim != 1:
        raise ValueError(f"ids must have one dimension, got shape {ids.shape}")
    places = np.searchsorted(sample_ids, ids).clip(max=max(len(sample_ids) - 1, 0))
    strangers = ids[sample_ids[places] != ids] if len(sample_ids) else ids
    if len(strangers):
        raise ValueError(f"{len(strangers)} ids are not in the {split} split, e.g. {int(strangers[0])}")
    return ids


def channels_last(images: np.ndarray) -> torch.Tensor:
    """Return (N, H, W, 3) uint8 as a (N, 3, H, W) tensor over the same memory, which is channels_last."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def training_views(
    images: np.ndarray, rows: np.ndarray, numbers: np.ndarray, *, epoch: int, seed: int, augment: AugmentConfig
) -> np.ndarray:
    """Return the augmented views (N, H, W, 3) uint8 of (N,) rows of ``images``, drawn by (N,) ``numbers``."""
    views = pad_crop_flip(images, rows, numbers, epoch=epoch, seed=seed, augment=augment)
    return jitter_batch(views, numbers, epoch=epoch, seed=seed) if augment.colour_jitter else views


class ArraySource(ImageSource):
    """A split whose images are one array in memory (CIFAR, SVHN, digits)."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        name: str,
        split: str,
        sample_ids: np.ndarray,
        num_classes: int,
        augment: AugmentConfig,
        seed: int,
        class_names: tuple[str, ...] = (),
    ) -> None:
        """Wrap ``images`` (M, H, W, 3) uint8 and ``labels`` (M,) int64, of which this split uses rows ``sample_ids``."""
        super().__init__(
            name=name,
            split=split,
            sample_ids=sample_ids,
            num_classes=num_classes,
            image_size=images.shape[1],
            seed=seed,
            class_names=class_names,
        )
        self._images = images
        self._labels = np.asarray(labels, dtype=np.int64)
        self.augment = augment

    def labels(self, ids: np.ndarray) -> np.ndarray:
        return self._labels[require_members(ids, self.sample_ids, split=self.split)]

    def read(
        self, ids: np.ndarray, *, epoch: int, train: bool, seed: int | None = None, numbers: np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels; ``numbers`` (N,) draw the views in place of the ids."""
        ids = require_members(ids, self.sample_ids, split=self.split)
        if train:
            images = training_views(
                self._images,
                ids,
                ids if numbers is None else numbers,
                epoch=epoch,
                seed=self.seed if seed is None else seed,
                augment=self.augment,
            )
        else:
            images = self._images[ids]
        return channels_last(images), torch.from_numpy(self._labels[ids])

    def identity(self) -> DataIdentity:
        digest = hashlib.sha256(np.ascontiguousarray(self._images).tobytes())
        digest.update(self._labels.astype("<i8").tobytes())
        return replace(super().identity(), counts=counted(self._labels, self.num_classes), content=digest.hexdigest())

    def describe(self) -> dict[str, Any]:
        # the pixels themselves: a re-encoded copy of a data set is another data set
        digest = hashlib.sha256(np.ascontiguousarray(self._images[self.sample_ids]).tobytes())
        digest.update(self._labels[self.sample_ids].astype("<i8").tobytes())
        return {**super().describe(), "content": digest.hexdigest()}


class Relabelled(ImageSource):
    """Another source whose labels are places among other class names: those that a network learned, in its order."""

    def __init__(self, source: ImageSource, class_names: tuple[str, ...]) -> None:
        """Wrap ``source``, whose names are ``class_names`` in another order."""
        super().__init__(
            name=source.name,
            split=source.split,
            sample_ids=source.sample_ids,
            num_classes=source.num_classes,
            image_size=source.image_size,
            seed=source.seed,
            class_names=class_names,
        )
        self._source = source
        self._place = np.array([class_names.index(name) for name in source.class_names], dtype=np.int64)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        return self._place[self._source.labels(ids)]

    def origins(self, ids: np.ndarray) -> np.ndarray | None:
        return self._source.origins(ids)

    def read(
        self, ids: np.ndarray, *, epoch: int, train: bool, seed: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self._source.read(ids, epoch=epoch, train=train, seed=seed)
        return images, torch.from_numpy(self._place)[labels]

    def identity(self) -> DataIdentity:
        return self._source.identity()

    def describe(self) -> dict[str, Any]:
        return {**self._source.describe(), "class_order": list(self.class_names)}

    def close(self) -> None:
        self._source.close()
