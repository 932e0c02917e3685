"""A training split whose batches hold extra images, or labelled ones several times."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distributed_at.batch import EXTRA
from distributed_at.data.extra import ExtraSet
from distributed_at.data.identity import DataIdentity
from distributed_at.data.source import ArraySource, ImageSource, channels_last, training_views
from distributed_at.data.uses import UseNumbers


class Mixed(ImageSource):
    """Reads what the numbers of a ``MixedOrder`` stand for; everything else about it is the labelled split's."""

    def __init__(self, labelled: ArraySource, extra: ExtraSet | None, numbers: UseNumbers) -> None:
        super().__init__(
            name=labelled.name,
            split=labelled.split,
            sample_ids=labelled.sample_ids,
            num_classes=labelled.num_classes,
            image_size=labelled.image_size,
            seed=labelled.seed,
            class_names=labelled.class_names,
        )
        self._labelled, self._extra, self._numbers = labelled, extra, numbers
        self.unlabelled = extra is not None and extra.unlabelled

    def origins(self, ids: np.ndarray) -> np.ndarray:
        return self._numbers.origins(ids)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64)
        beside = self.origins(ids) == EXTRA
        labels = np.empty(len(ids), dtype=np.int64)
        labels[~beside] = self._labelled.labels(self._numbers.labelled_ids(ids[~beside]))
        if beside.any():
            labels[beside] = self._required_extra.labels(self._numbers.extra_rows(ids[beside]))
        return labels

    def read(
        self, ids: np.ndarray, *, epoch: int, train: bool, seed: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = np.asarray(ids, dtype=np.int64)
        beside = self.origins(ids) == EXTRA
        images = np.empty((len(ids), self.image_size, self.image_size, 3), dtype=np.uint8)
        own = ids[~beside]
        views, _ = self._labelled.read(
            self._numbers.labelled_ids(own), epoch=epoch, train=train, seed=seed, numbers=own
        )
        images[~beside] = views.permute(0, 2, 3, 1).numpy()
        if beside.any():
            extra = self._required_extra.read(self._numbers.extra_rows(ids[beside]))
            if train:
                seed = self.seed if seed is None else seed
                extra = training_views(
                    extra, np.arange(len(extra)), ids[beside], epoch=epoch, seed=seed, augment=self._labelled.augment
                )
            images[beside] = extra
        return channels_last(images), torch.from_numpy(self.labels(ids))

    @property
    def _required_extra(self) -> ExtraSet:
        if self._extra is None:
            raise ValueError("the number of an extra image, and there are none")
        return self._extra

    def identity(self) -> DataIdentity:
        return self._labelled.identity()

    def identities(self) -> dict[str, DataIdentity]:
        beside = {} if self._extra is None else {"extra": self._extra.identity()}
        return {**self._labelled.identities(), **beside}

    def describe(self) -> dict[str, Any]:
        beside = {} if self._extra is None else {"extra": self._extra.identity().content}
        return {**self._labelled.describe(), **beside}

    def close(self) -> None:
        self._labelled.close()
        if self._extra is not None:
            self._extra.close()
