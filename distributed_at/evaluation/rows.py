"""Per-sample results as columns: what a ledger stores and an evaluation returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

SURVIVED = ""  # `attack` of a sample that no attack broke
CLEAN = "clean"  # `attack` of a sample that was wrong before any attack


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Results of N samples, one entry a sample in every column.

    Attributes:
        sample_id: (N,) int64, ids in the published split.
        label: (N,) int64.
        clean_prediction: (N,) int64, class of the unperturbed image.
        adv_prediction: (N,) int64, class of the attacked image (of the clean one where nothing was attacked).
        correct_clean: (N,) bool.
        correct_adv: (N,) bool, right under this protocol; equals ``correct_clean`` for clean accuracy.
        loss: (N,) float64, cross-entropy of the label at the attacked image; NaN where it is not finite.
        target_hit: (N,) bool, a targeted attack reached its target.
        attack: (N,) str, name of the attack that broke the sample, ``clean``, or empty where it survived.
    """

    sample_id: np.ndarray
    label: np.ndarray
    clean_prediction: np.ndarray
    adv_prediction: np.ndarray
    correct_clean: np.ndarray
    correct_adv: np.ndarray
    loss: np.ndarray
    target_hit: np.ndarray
    attack: np.ndarray

    def __post_init__(self) -> None:
        for name, dtype in COLUMNS.items():
            column: np.ndarray = np.asarray(getattr(self, name)).astype(dtype)
            if column.shape != (len(self.sample_id),):
                raise ValueError(f"column {name} has shape {column.shape}, expected ({len(self.sample_id)},)")
            if name == "loss":
                column = np.where(np.isfinite(column), column, np.nan)
            object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(self.sample_id)

    def take(self, index: np.ndarray) -> Rows:
        """Return the rows at ``index`` (integers or a mask), in that order."""
        return Rows(**{name: getattr(self, name)[index] for name in COLUMNS})

    def by_id(self) -> Rows:
        """Return the rows in the order of their sample ids."""
        return self.take(np.argsort(self.sample_id, kind="stable"))


COLUMNS: dict[str, type] = {
    "sample_id": np.int64,
    "label": np.int64,
    "clean_prediction": np.int64,
    "adv_prediction": np.int64,
    "correct_clean": np.bool_,
    "correct_adv": np.bool_,
    "loss": np.float64,
    "target_hit": np.bool_,
    "attack": np.str_,
}
assert tuple(COLUMNS) == tuple(f.name for f in fields(Rows))


def empty_rows() -> Rows:
    """Return zero rows."""
    return Rows(**{name: np.zeros(0, dtype=dtype) for name, dtype in COLUMNS.items()})


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Return all rows of ``parts`` in order; no duplicates are removed."""
    if not parts:
        return empty_rows()
    return Rows(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in COLUMNS})
