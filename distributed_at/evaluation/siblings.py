"""Rows of the same PGD at fewer steps, kept in memory and in ledgers of their own while the longest one runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distributed_at.evaluation.ledger import Ledger
from distributed_at.evaluation.protocol import Protocol
from distributed_at.evaluation.rows import Rows, concatenate


class Siblings:
    """Keeps what one PGD run learns at fewer steps, as rows of those protocols."""

    def __init__(self, names: dict[int, str | None]) -> None:
        self._names = names
        self._ledgers: dict[int, Ledger] = {}
        self._parts: dict[int, list[Rows]] = {count: [] for count in names}

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of steps, rising."""
        return tuple(sorted(self._names))

    def open(self, protocol: Protocol, folder: Path | None) -> None:
        """Open a ledger for each number of steps beside that of ``protocol``."""
        if folder is None:
            return
        for count, name in self._names.items():
            own = dataclasses.replace(protocol, num_steps=count, title=name or "")
            self._ledgers[count] = Ledger.open(folder / own.folder_name, own)

    def add(self, count: int, rows: Rows) -> None:
        """Keep rows of PGD-``count``."""
        if count in self._ledgers:
            self._ledgers[count].append(rows)
        self._parts[count].append(rows)

    def rows(self, count: int) -> Rows:
        """Return all rows of PGD-``count`` that this process made."""
        return concatenate(self._parts[count])
