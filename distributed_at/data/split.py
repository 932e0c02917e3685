"""Carves validation images, and subsets for smoke runs, out of a published split: by counters, or as a paper's code does."""

from __future__ import annotations

import numpy as np

from distributed_at.config import DataConfig
from distributed_at.config.data import ValidationChoice
from distributed_at.errors import ConfigError, DataError
from distributed_at.rng import Purpose, permutation

# Separate counters, so that a limit does not follow the validation choice.
_VALIDATION, _LIMIT, _FIXED_TEST = 0, 1, 2


def carve_validation(
    ids: np.ndarray, *, size: int, seed: int, choice: ValidationChoice = "counters"
) -> tuple[np.ndarray, np.ndarray]:
    """Return (train, validation) ids: disjoint, sorted, together equal to ``ids``.

    Which images are held out depends on ``seed`` (``data.validation_seed``), ``choice`` and the number of ids alone.

    Args:
        ids: (N,) of the published split.
        size: images held out.
        seed: of 'counters' and 'numpy'.
        choice: 'counters'; 'first', the first ids (Gowal et al., "Uncovering the limits", section 3.1, hold out 1,024; their
            code's comment skips the first ones); 'numpy', the first places of ``numpy.random.permutation`` after
            ``numpy.random.seed(seed)`` (Rice et al.'s generate_validation.py: 1,000 of 50,000 by seed 0).

    Raises:
        ConfigError: ``size`` leaves no image to train on.
    """
    if size >= len(ids):
        raise ConfigError(f"data.validation_size {size} leaves nothing to train on: train has {len(ids)} images")
    ids = np.sort(np.asarray(ids, dtype=np.int64))
    chosen = np.zeros(len(ids), dtype=bool)
    chosen[_held_out(len(ids), size, seed, choice)] = True
    return ids[~chosen], ids[chosen]


def _held_out(num_samples: int, size: int, seed: int, choice: ValidationChoice) -> np.ndarray:
    if choice == "first":
        return np.arange(size)
    if choice == "numpy":  # numpy promises that this generator's streams never change
        return np.random.RandomState(seed).permutation(num_samples)[:size]
    return permutation(seed, _VALIDATION, num_samples, purpose=Purpose.SPLIT)[:size]


def limit_ids(ids: np.ndarray, limit: int | None, *, seed: int) -> np.ndarray:
    """Return at most ``limit`` of the (N,) ids, sorted, drawn evenly over the split (which may be sorted by class)."""
    if limit is None or limit >= len(ids):
        return ids
    order = permutation(seed, _LIMIT, len(ids), purpose=Purpose.SPLIT)
    return np.sort(ids[order[:limit]])


def fixed_test_ids(num_samples: int, test_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (train, test) ids of a data set published without a split: the same two parts always, sorted."""
    order = permutation(0, _FIXED_TEST, num_samples, purpose=Purpose.SPLIT)
    return np.sort(order[test_size:]), np.sort(order[:test_size])


def split_ids(published: np.ndarray, config: DataConfig, split: str, *, seed: int) -> np.ndarray:
    """Choose the ids of ``split`` among those of the published split that it comes from."""
    if split == "test":
        return limit_ids(published, config.limit_test, seed=seed)
    train, validation = carve_validation(
        published, size=config.validation_size, seed=config.validation_seed, choice=config.validation_choice
    )
    return validation if split == "validation" else limit_ids(train, config.limit_train, seed=seed)


def check_classes(config: DataConfig, found: int, where: str) -> None:
    if config.num_classes is not None and config.num_classes != found:
        raise DataError(
            f"data.num_classes is {config.num_classes}, but {where} has {found} classes: set num_classes: {found}, "
            f"or check data.path"
        )
