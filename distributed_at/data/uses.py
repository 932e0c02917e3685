"""Numbers for the uses of images in an epoch that shows some of them several times, or images of a pool beside the data set.

Every random choice about an image is drawn by its number (crop, flip, the attack's start, dropout), so two uses of an
image in one epoch need two numbers. The first use of an image of the data set keeps the image's own id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distributed_at.batch import EXTRA, LABELLED
from distributed_at.errors import ConfigError

FIRST_EXTRA = 1 << 31  # counters hold 32 bits: one half for images of the data set, one for those beside it


@dataclass(frozen=True)
class UseNumbers:
    """Maps (image, use) to a number below 2^32 and back.

    Attributes:
        span: ids of the data set lie in [0, span).
        num_extra: rows of the extra images; 0 where there are none.
    """

    span: int
    num_extra: int

    def require_room(self, labelled_uses: int, extra_uses: int) -> None:
        """Refuse an epoch of more uses of an image than there are numbers.

        Raises:
            ConfigError: so many uses of so many images do not fit into 31 bits.
        """
        for what, images, uses in (("labelled", self.span, labelled_uses), ("extra", self.num_extra, extra_uses)):
            if images * uses > FIRST_EXTRA:
                raise ConfigError(
                    f"an epoch shows {what} images, {images:,} of them, up to {uses:,} times each: at most 2^31 uses can "
                    "be told apart; lower data.labelled_copies or train.batch_size"
                )

    def of_labelled(self, ids: np.ndarray, use: np.ndarray) -> np.ndarray:
        """Return the (N,) int64 numbers of uses (from 0) of (N,) ids."""
        return ids + use * self.span

    def of_extra(self, rows: np.ndarray, use: np.ndarray) -> np.ndarray:
        """Return the (N,) int64 numbers of uses (from 0) of (N,) rows of the extra images."""
        return FIRST_EXTRA + rows + use * self.num_extra

    def origins(self, numbers: np.ndarray) -> np.ndarray:
        """Return (N,) int8 of ``LABELLED`` and ``EXTRA``."""
        return np.where(numbers >= FIRST_EXTRA, EXTRA, LABELLED).astype(np.int8)

    def labelled_ids(self, numbers: np.ndarray) -> np.ndarray:
        """Return the ids in the published split that (N,) numbers of labelled images stand for."""
        return numbers % self.span

    def extra_rows(self, numbers: np.ndarray) -> np.ndarray:
        """Return the rows that (N,) numbers of extra images stand for."""
        return (numbers - FIRST_EXTRA) % self.num_extra
