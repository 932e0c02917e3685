"""What an evaluation needs of a data set, and which of its samples a smaller evaluation takes."""

from __future__ import annotations

import json
from typing import Protocol as StructuralType

import numpy as np
import torch

from distributed_at.errors import ConfigError
from distributed_at.rng import EVALUATION_EPOCH, Purpose, permutation


class Source(StructuralType):
    """One split of a data set; the data package's sources fit."""

    num_classes: int
    split: str
    sample_ids: np.ndarray

    def read(self, ids: np.ndarray, *, epoch: int, train: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return uint8 images (N, C, H, W) and int64 labels (N,) of the samples ``ids``."""
        ...


def describe_pixels(source: Source) -> str:
    """Return as JSON what the source says of its pixels (resizing, decoder, a hash of the content); for the protocol.

    Data set, split and ids are left out, because the protocol has fields for them.
    """
    describe = getattr(source, "describe", None)
    content = describe() if describe is not None else {}
    own = ("dataset", "split", "num_samples", "ids")
    return json.dumps({k: v for k, v in content.items() if k not in own}, sort_keys=True, default=str)


def evaluation_ids(source: Source, num_samples: int | None = None) -> np.ndarray:
    """Return the sorted ids of a split, or of ``num_samples`` of them drawn by counters.

    The draw ignores the run's seed, so that two runs of a data set are measured on the same samples; it is not the
    first ones, because published splits may be sorted by class.

    Raises:
        ConfigError: where the split has fewer samples.
    """
    ids = np.sort(np.asarray(source.sample_ids, dtype=np.int64))
    if num_samples is None or num_samples == len(ids):
        return ids
    if not 0 < num_samples < len(ids):
        raise ConfigError(f"num_samples: the split {source.split!r} has {len(ids)} samples, asked for {num_samples}")
    chosen = permutation(0, EVALUATION_EPOCH, len(ids), purpose=Purpose.SPLIT)[:num_samples]
    return np.sort(ids[chosen])
