"""One planted fault: an edit that a tired person could make, and the tests of ``make test`` that fail because of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "distributed_at"


@dataclass(frozen=True)
class Mutation:
    """Replaces ``old``, which stands exactly once in ``file``, by ``new``.

    Attributes:
        what: the fault in a few words, as a person would report it.
        file: relative to the package, e.g. "engine/trainer.py".
        old, new: source text.
        caught_by: ids of the tests that must fail, e.g. "tests/unit/test_order.py::test_each_image_once"; a
            parametrised test may be named with or without its brackets. The first that fails is enough.
    """

    what: str
    file: str
    old: str
    new: str
    caught_by: str | tuple[str, ...]

    @property
    def tests(self) -> tuple[str, ...]:
        """The tests as a tuple."""
        return (self.caught_by,) if isinstance(self.caught_by, str) else self.caught_by

    @property
    def room(self) -> str:
        """First folder of the file, e.g. "engine"."""
        return self.file.split("/", 1)[0]

    def planted(self, text: str) -> str:
        """Return the file's text with the fault in it.

        Raises:
            ValueError: where ``old`` does not stand exactly once, or nothing changes.
        """
        found = text.count(self.old)
        if found != 1:
            raise ValueError(f"{self.what}: the text to replace stands {found} times in {self.file}")
        changed = text.replace(self.old, self.new)
        if changed == text:
            raise ValueError(f"{self.what}: the edit changes nothing in {self.file}")
        return changed
