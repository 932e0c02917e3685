"""Chooses the best-scored images of each class (Gowal et al., "Uncovering the limits", section 4.3: top N/10 of 10 classes)."""

from __future__ import annotations

import numpy as np

from distributed_at.errors import ConfigError


def best_of_each_class(
    labels: np.ndarray,
    scores: np.ndarray,
    keep: int,
    num_classes: int,
    *,
    field: str,
    eligible: np.ndarray | None = None,
) -> np.ndarray:
    """Return the rows of the ``keep / num_classes`` highest scores of each class, rising.

    Args:
        labels: (N,) integers in [0, num_classes).
        scores: (N,) floats; of equal ones the earlier image is taken.
        keep: images in all, a multiple of ``num_classes``.
        num_classes: K.
        field: how messages call ``keep``.
        eligible: (N,) bool, images that may be chosen; None = all.

    Raises:
        ConfigError: ``keep`` does not divide, or a class has fewer images.
    """
    each, rest = divmod(keep, num_classes)
    if rest or each < 1:
        raise ConfigError(
            f"{field} {keep} is not a multiple of {num_classes} classes: each gives the same number; the nearest is "
            f"{max(1, round(keep / num_classes)) * num_classes}"
        )
    chosen = []
    for label in range(num_classes):
        of_class = labels == label if eligible is None else (labels == label) & eligible
        rows = np.flatnonzero(of_class)
        if len(rows) < each:
            raise ConfigError(
                f"{field} {keep} takes {each:,} images of each class, and class {label} has {len(rows):,}: "
                f"use at most {_least(labels, eligible, num_classes) * num_classes:,}"
            )
        best = rows[np.argsort(-scores[rows], kind="stable")[:each]]
        chosen.append(best)
    return np.sort(np.concatenate(chosen))


def _least(labels: np.ndarray, eligible: np.ndarray | None, num_classes: int) -> int:
    held = labels if eligible is None else labels[eligible]
    return int(np.bincount(held[held >= 0], minlength=num_classes).min())
