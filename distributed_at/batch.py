"""One batch of images as every layer above the data sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """Images of one micro-batch with the counters that every random choice about them is computed from.

    Attributes:
        ids: (N,) int64, sample ids in the published split.
        images: (N, 3, H, W) float32 in [0, 1].
        labels: (N,) int64.
        epoch: epoch whose counters apply.
        step: global optimiser step.
        group_ids: (N,) int64, number of each sample's BN group within the epoch, the same at every world size.
    """

    ids: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    epoch: int
    step: int
    group_ids: torch.Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]
