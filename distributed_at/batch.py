"""One batch of images as every layer above the data sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LABELLED, EXTRA = 0, 1  # origins of an image: the data set itself, or a pool beside it


@dataclass(frozen=True)
class Batch:
    """Images of one micro-batch with the counters that every random choice about them is computed from.

    Attributes:
        ids: (N,) int64, sample ids in the published split; where batches hold images several times, or images beside the
            data set, numbers of their uses (``data/uses.py``), of which no two in an epoch are equal.
        images: (N, 3, H, W) float32 in [0, 1].
        labels: (N,) int64; -1 = none.
        epoch: epoch whose counters apply.
        step: global optimiser step.
        group_ids: (N,) int64, number of each sample's BN group within the epoch, the same at every world size.
        origin: (N,) int8, ``LABELLED`` or ``EXTRA``; None = all are of the data set itself.
        soft_labels: (N, K) float, the class distribution that each image stands for; None = its label's. An attack whose
            loss takes soft labels climbs it too.
        place: row of this rank's share of the step's batch at which this micro-batch begins; None = a stand-in for
            images that a rank does not have, whose loss counts nothing and which must leave no trace.
        repeat: which use of this batch the step is, from 0, for objectives that use a batch several times.
        unlabelled: images without a label.
        labelled_share: share of images with a label in the whole step, over all ranks; 0 = none has one.
    """

    ids: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    epoch: int
    step: int
    group_ids: torch.Tensor
    origin: torch.Tensor | None = None
    soft_labels: torch.Tensor | None = None
    place: int | None = 0
    repeat: int = 0
    unlabelled: int = 0
    labelled_share: float = 1.0

    def __len__(self) -> int:
        return self.ids.shape[0]
