"""Which samples a training step uses, as a function of (seed, epoch, step).

How a step is shared between ranks is the engine's ``batching.py``. Nothing here reads an image or keeps state: any step of any epoch can be asked for in any order, on any world size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np

from distributed_at.errors import ConfigError
from distributed_at.rng import permutation


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Return the (num_samples,) int64 order of an epoch, read-only."""
    order = permutation(seed, epoch, num_samples)
    order.setflags(write=False)  # shared between callers
    return order


def batches_per_epoch(num_samples: int, batch_size: int, *, drop_last: bool) -> int:
    """Return the batches of a pass over ``num_samples`` images, an incomplete last one counted unless it is dropped.

    Raises:
        ConfigError: not one, because the batch is larger than the split and would be dropped.
    """
    full, rest = divmod(num_samples, batch_size)
    batches = full if drop_last else full + (rest > 0)
    if batches == 0:
        raise ConfigError(
            f"train.batch_size {batch_size} is larger than the training split ({num_samples} images) and "
            f"train.drop_last drops it: use a batch_size of at most {num_samples}, or drop_last: false"
        )
    return batches


class Order(Protocol):
    """Which samples the steps of a run use; a pure function of seed, epoch and step.

    Attributes:
        steps_per_epoch: of every epoch.
        repeats: steps in a row that show the same batch.
    """

    steps_per_epoch: int
    repeats: int

    def batch(self, step_in_epoch: int) -> int:
        """Return the number, within the epoch, of the batch that a step shows."""

    def labelled_share(self, epoch: int, step_in_epoch: int) -> float:
        """Return the share of a step's images that are of the data set itself."""

    def ids(self, epoch: int, step_in_epoch: int) -> np.ndarray:
        """Return the int64 ids of a step over all ranks, in the order that its groups are cut from."""


class StepOrder:
    """The global order of an epoch, cut into steps of ``batch_size`` samples.

    Step ``s`` of epoch ``e`` is ``order(e)[s * B : (s + 1) * B]``; the order depends on the seed and the epoch alone.
    With ``repeats`` m each batch is that of m steps in a row: step ``s`` shows batch ``s // m``.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        drop_last: bool = True,
        *,
        sample_ids: np.ndarray | None = None,
        repeats: int = 1,
    ) -> None:
        """Describe an order.

        Args:
            num_samples: images in the split.
            batch_size: global batch B, over all ranks.
            seed: the run's seed.
            drop_last: leave out the last incomplete batch of each epoch.
            sample_ids: (num_samples,) int64, the ids to order; null means ``range(num_samples)``. The order of the
                positions does not depend on them.
            repeats: steps in a row that show the same batch.

        Raises:
            ConfigError: the batch is larger than the split and would be dropped, so that an epoch has no step.
        """
        if num_samples < 1 or batch_size < 1:
            raise ConfigError(f"an order needs num_samples and batch_size >= 1, got {num_samples} and {batch_size}")
        if sample_ids is not None and len(sample_ids) != num_samples:
            raise ValueError(f"sample_ids has {len(sample_ids)} entries for num_samples {num_samples}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.sample_ids = None if sample_ids is None else np.asarray(sample_ids, dtype=np.int64)
        self.repeats = repeats
        self.steps_per_epoch = repeats * batches_per_epoch(num_samples, batch_size, drop_last=drop_last)

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch, step in epoch) of a global step that counts from 0."""
        return divmod(step, self.steps_per_epoch)

    def batch(self, step_in_epoch: int) -> int:
        """Return the number, within the epoch, of the batch that a step shows."""
        return step_in_epoch // self.repeats

    def length(self, step_in_epoch: int) -> int:
        """Return the number of samples of a step: ``batch_size``, or less for a kept last batch."""
        self._check(step_in_epoch)
        return min(self.batch_size, self.num_samples - self.batch(step_in_epoch) * self.batch_size)

    def ids(self, epoch: int, step_in_epoch: int) -> np.ndarray:
        """Return the (length,) int64 ids of a step over all ranks, in the order that its groups are cut from."""
        self._check(step_in_epoch)
        start = self.batch(step_in_epoch) * self.batch_size
        positions = epoch_order(self.seed, epoch, self.num_samples)[start : start + self.batch_size]
        return positions.copy() if self.sample_ids is None else self.sample_ids[positions]

    def labelled_share(self, epoch: int, step_in_epoch: int) -> float:
        """Return 1: all samples are of the data set itself."""
        return 1.0

    def _check(self, step_in_epoch: int) -> None:
        if not 0 <= step_in_epoch < self.steps_per_epoch:
            raise ValueError(f"step_in_epoch must be in [0, {self.steps_per_epoch}), got {step_in_epoch}")
