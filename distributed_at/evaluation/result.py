"""The numbers of one evaluation with the rows that they were counted from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distributed_at.evaluation.protocol import Protocol
from distributed_at.evaluation.rows import Rows
from distributed_at.statistics import wilson


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What an evaluation found; every number is counted from ``rows``.

    Attributes:
        protocol: what was measured.
        rows: one row a sample, in the order of sample ids.
        seconds: wall-clock time of the calls that computed its rows.
        computed: rows that this call computed (over all ranks); the others came from the ledger.
        expected: samples that the protocol covers; ``total`` is smaller only while other jobs still work.
    """

    protocol: Protocol
    rows: Rows
    seconds: float
    computed: int
    expected: int

    @property
    def complete(self) -> bool:
        """Every sample of the protocol has a row."""
        return self.total == self.expected

    @property
    def total(self) -> int:
        """Samples counted."""
        return len(self.rows)

    @property
    def correct(self) -> int:
        """Samples that are right under this protocol."""
        return int(self.rows.correct_adv.sum())

    @property
    def accuracy(self) -> float:
        """``correct / total``, a share in [0, 1]."""
        return self.correct / self.total if self.total else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95% interval of the accuracy; (0, 1) where nothing was counted yet."""
        return wilson(self.correct, self.total)

    @property
    def low(self) -> float:
        """Lower end of the 95% interval."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """Upper end of the 95% interval."""
        return self.interval[1]

    @property
    def clean_correct(self) -> int:
        """Samples that are right before any attack."""
        return int(self.rows.correct_clean.sum())

    @property
    def clean_accuracy(self) -> float:
        """Share of samples that are right before any attack."""
        return self.clean_correct / self.total if self.total else float("nan")

    @property
    def attack_success_rate(self) -> float | None:
        """Share of all samples that a targeted attack moved to its target; None for other protocols."""
        if not self.protocol.targeted or not self.total:
            return None
        return float(self.rows.target_hit.mean())

    def broken_by(self) -> dict[str, int]:
        """Return how many samples each attack of the protocol broke, in the order that they ran."""
        return {name: int((self.rows.attack == name).sum()) for name in self.protocol.attacks}

    def event(self) -> dict[str, Any]:
        """Return the fields of an ``evaluation`` event: JSON types only."""
        content: dict[str, Any] = {
            "split": self.protocol.split,
            "protocol": {"name": self.protocol.name, "hash": self.protocol.hash},
            "branch": self.protocol.branch,
            "metric": self.protocol.metric,
            "correct": self.correct,
            "total": self.total,
            "accuracy": self.accuracy,
            "low": self.low,
            "high": self.high,
            "seconds": self.seconds,
        }
        if self.attack_success_rate is not None:
            content["attack_success_rate"] = self.attack_success_rate
        return content

    def summary(self) -> dict[str, Any]:
        """Return what ``summary.json`` holds: the event with the whole protocol and the counts behind the number."""
        return {
            **self.event(),
            "protocol": self.protocol.to_dict(),
            "clean_correct": self.clean_correct,
            "clean_accuracy": self.clean_accuracy,
            "broken_by": self.broken_by(),
        }
