"""What data a run is of: small enough to be written beside every checkpoint, exact enough to tell other data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_NAMED = 20  # classes that a message lists at most


@dataclass(frozen=True, kw_only=True)
class DataIdentity:
    """A published split of a data set, before limits and held-out images.

    Attributes:
        dataset: its name in a recipe.
        part: 'train' or 'test'.
        classes: names, in the order of labels; empty where nobody says them.
        counts: images a class, in that order.
        content: SHA-256 of pixels and labels, or of a folder's names and of the fingerprints of its files.
    """

    dataset: str
    part: str
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    content: str

    @property
    def images(self) -> int:
        """Images of the split."""
        return sum(self.counts)

    @property
    def digest(self) -> str:
        """16 hex digits over everything above."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON types."""
        return {**asdict(self), "classes": list(self.classes), "counts": list(self.counts)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DataIdentity:
        """Return what ``to_dict`` wrote."""
        return cls(
            dataset=str(content["dataset"]),
            part=str(content["part"]),
            classes=tuple(map(str, content["classes"])),
            counts=tuple(map(int, content["counts"])),
            content=str(content["content"]),
        )

    def difference(self, other: DataIdentity) -> str | None:
        """Return the first thing in which ``other`` is other data, in words; None where it is the same."""
        for name in ("dataset", "part"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {theirs!r} in place of {mine!r}"
        told = classes_differ(self.classes, other.classes)
        if told is not None:
            return told
        if self.counts != other.counts:
            for label, (mine, theirs) in enumerate(zip(self.counts, other.counts, strict=False)):
                if mine != theirs:
                    return f"{theirs} images of class {self.name_of(label)} in place of {mine}"
            return f"{len(other.counts)} classes in place of {len(self.counts)}"
        if self.content != other.content:
            return f"other contents (sha256 {other.content[:12]}… in place of {self.content[:12]}…)"
        return None

    def name_of(self, label: int) -> str:
        """Return what messages call a class."""
        return repr(self.classes[label]) if label < len(self.classes) else str(label)

    def without_images(self) -> list[str]:
        """Return the classes that no image has, as messages call them."""
        return [self.name_of(label) for label, count in enumerate(self.counts) if count == 0]


def classes_differ(mine: Sequence[str], theirs: Sequence[str]) -> str | None:
    """Return how class names differ, in words; None where they are the same, or one side has none."""
    if not mine or not theirs or tuple(mine) == tuple(theirs):
        return None
    if set(mine) == set(theirs):
        place = next(i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
        return f"class {place} is {theirs[place]!r} in place of {mine[place]!r} (the same classes in another order)"
    gone, new = sorted(set(mine) - set(theirs)), sorted(set(theirs) - set(mine))
    parts = [f"without {_listed(gone)}" if gone else "", f"with {_listed(new)}" if new else ""]
    return f"other classes: {' and '.join(part for part in parts if part)}"


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:_NAMED]))
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def counted(labels: np.ndarray, num_classes: int) -> tuple[int, ...]:
    """Return the images of each class."""
    return tuple(np.bincount(np.asarray(labels, dtype=np.int64), minlength=num_classes).tolist())
