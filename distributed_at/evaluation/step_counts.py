"""PGD at several numbers of steps in one pass: the first k of n steps are PGD-k itself, where both step alike.

Each number of steps is a protocol of its own, with the hash, ledger and rows that it would have had alone; only the
attack is shared, so PGD-{20, 100, 500, 2000} (Xie & Yuille 2020, table 7) cost what PGD-2000 costs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from distributed_at.evaluation.kinds.pgd import PgdProtocol
from distributed_at.evaluation.ledger import Ledger
from distributed_at.evaluation.protocol import Protocol
from distributed_at.evaluation.rows import Rows, concatenate


class FewerSteps:
    """Keeps what one PGD run learns at fewer steps, as rows of those protocols, in memory and in ledgers of their own."""

    def __init__(self, titles: dict[int, str]) -> None:
        """``titles``: number of steps -> name for tables, empty for the protocol's own."""
        self._titles = titles
        self._ledgers: dict[int, Ledger] = {}
        self._parts: dict[int, list[Rows]] = {count: [] for count in titles}

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of steps, rising."""
        return tuple(sorted(self._titles))

    def open(self, protocol: Protocol, folder: Path | None) -> None:
        """Open a ledger for each number of steps beside that of ``protocol``, below ``folder``."""
        if folder is None:
            return
        for count, title in self._titles.items():
            assert isinstance(protocol, PgdProtocol)
            own = dataclasses.replace(protocol, num_steps=count, title=title)
            self._ledgers[count] = Ledger.of(folder, own)

    def add(self, count: int, rows: Rows) -> None:
        """Keep rows of PGD-``count``."""
        if count in self._ledgers:
            self._ledgers[count].append(rows)
        self._parts[count].append(rows)

    def rows(self, count: int) -> Rows:
        """Return all rows of PGD-``count`` that this process made."""
        return concatenate(self._parts[count])
