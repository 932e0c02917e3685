"""Several attacks as one adversary: a sample is robust where no attack of the set broke it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distributed_at.errors import UserError
from distributed_at.evaluation.protocol import Protocol
from distributed_at.evaluation.result import EvaluationResult
from distributed_at.statistics import wilson


class IncomparableError(UserError):
    """Results that cannot be put together: of other weights, branches, samples or balls."""


@dataclass(frozen=True, kw_only=True)
class WorstCase:
    """Robust accuracy against a set of attacks.

    Attributes:
        protocols: the attacks, in the order that they were counted.
        survivors: (S,) sample ids that no attack broke.
        remaining: samples still standing after each attack.
        total: samples that the number is over.
    """

    protocols: tuple[Protocol, ...]
    survivors: np.ndarray
    remaining: tuple[int, ...]
    total: int

    @property
    def correct(self) -> int:
        """Samples that no attack broke."""
        return len(self.survivors)

    @property
    def accuracy(self) -> float:
        """Worst-case robust accuracy, a share in [0, 1]."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson 95% interval of the accuracy."""
        return wilson(self.correct, self.total)

    @property
    def name(self) -> str:
        """Names of the attacks, joined: ``PGD-20 linf 8/255 + AutoAttack linf 8/255``."""
        return " + ".join(p.name for p in self.protocols)


# the ball, the model and the arithmetic must agree for an intersection to mean one adversary
_SHARED = ("weights", "model", "branch", "dataset", "split", "preprocessing", "pixel_box")


def worst_case(results: Sequence[EvaluationResult]) -> WorstCase:
    """Intersect the surviving samples of several results.

    The first result names the samples. Each later one may cover fewer, as long as it covers all that still stand (an
    attack on survivors).

    Raises:
        IncomparableError: where the results are not of one model and one ball, or leave a standing sample out.
    """
    if not results:
        raise IncomparableError("worst_case needs at least one result, got none")
    first = results[0].protocol
    ball = next((r.protocol.ball for r in results if r.protocol.ball is not None), None)
    standing = np.unique(results[0].rows.sample_id)
    total, remaining = len(standing), []
    for result in results:
        protocol = result.protocol
        names = [n for n in _SHARED if getattr(protocol, n) != getattr(first, n)]
        names += ["the ball"] if protocol.ball not in (None, ball) else []
        if names:
            raise IncomparableError(f"{protocol.name} and {first.name} differ in {', '.join(names)}")
        missing = np.setdiff1d(standing, result.rows.sample_id)
        if len(missing):
            raise IncomparableError(f"{protocol.name} left out {len(missing)} samples, e.g. sample {missing[0]}")
        standing = np.intersect1d(standing, result.rows.sample_id[result.rows.correct_adv])
        remaining.append(len(standing))
    return WorstCase(
        protocols=tuple(r.protocol for r in results),
        survivors=standing,
        remaining=tuple(remaining),
        total=total,
    )


def worst_cases(results: Sequence[EvaluationResult]) -> list[WorstCase]:
    """Return the worst case of each model, ball and set of samples that at least two attacks of ``results`` share."""
    groups: dict[tuple[Any, ...], list[EvaluationResult]] = {}
    for result in results:
        if result.protocol.attacked:
            shared = tuple(getattr(result.protocol, name) for name in (*_SHARED, "data_ids"))
            groups.setdefault((*shared, result.protocol.ball), []).append(result)
    return [worst_case(group) for group in groups.values() if len(group) > 1]
