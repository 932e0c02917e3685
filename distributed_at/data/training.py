"""Opens what a run trains on: the split, extra images beside it where the recipe names some, and the order of both."""

from __future__ import annotations

from collections.abc import Callable

from distributed_at.config import RunConfig
from distributed_at.data.extra import open_extra
from distributed_at.data.index import Progress
from distributed_at.data.mixed import Mixed
from distributed_at.data.mixed_order import MixedOrder
from distributed_at.data.order import Order, StepOrder
from distributed_at.data.source import ArraySource, ImageSource
from distributed_at.data.sources import open_split
from distributed_at.errors import ConfigError


def open_training(
    config: RunConfig,
    *,
    repeats: int = 1,
    warn: Callable[[str, str], None] | None = None,
    progress: Progress | None = None,
) -> tuple[ImageSource, Order]:
    """Open the training images of a recipe and say which of them each step uses.

    Args:
        config: the recipe.
        repeats: steps in a row that show the same batch.
        warn: called with (code, message) for facts that a run must record.
        progress: called with (done, in all) while a folder is indexed, or extra images are packed, for the first time.

    Raises:
        DataError, ConfigError: the data are not there, are not what the recipe says, or leave an epoch no step.
    """
    data, train = config.data, config.train
    source = open_split(data, "train", seed=config.seed, warn=warn, progress=progress)
    if not data.mixes:
        order = StepOrder(
            source.num_samples,
            train.batch_size,
            seed=config.seed,
            drop_last=train.drop_last,
            sample_ids=source.sample_ids,
            repeats=repeats,
        )
        return source, order
    if not isinstance(source, ArraySource):
        raise ConfigError(
            f"data.extra and data.labelled_copies go with data sets that are one array in memory; '{data.dataset}' is not"
        )
    extra = None
    if data.extra is not None:
        classes = data.num_classes or source.num_classes
        extra = open_extra(
            data.extra,
            num_classes=classes,
            image_size=source.image_size,
            class_names=source.class_names,
            progress=progress,
        )
    mixed = MixedOrder(
        source.sample_ids,
        0 if extra is None else len(extra),
        train.batch_size,
        seed=config.seed,
        drop_last=train.drop_last,
        repeats=repeats,
        copies=data.labelled_copies,
        ratios=data.ratios,
    )
    return Mixed(source, extra, mixed.numbers), mixed
