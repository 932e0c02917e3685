"""Intervals and tests for accuracies, which are counts: k right of n. Not for losses or times."""

from __future__ import annotations

import math
from dataclasses import dataclass

CONFIDENCE = 0.95


def _check(correct: int, total: int, confidence: float) -> None:
    if total < 0 or not 0 <= correct <= total:
        raise ValueError(f"correct must lie in [0, total], got {correct} of {total}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")


def wilson(correct: int, total: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the Wilson score interval of ``correct / total``, in [0, 1] (Wilson 1927; Brown, Cai, DasGupta 2001, eq. 4).

    Its mean coverage is the nominal one also near 0 and 1 and for small n. No images: (0, 1).
    """
    _check(correct, total, confidence)
    if total == 0:
        return 0.0, 1.0
    from scipy.special import ndtri

    z = float(ndtri(0.5 + confidence / 2))
    share, z2 = correct / total, z * z
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    # The ends are exact at the borders, where rounding would leave 1e-17.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return low, high


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Two models on the same images: what one gets right and the other does not."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(only_first: int, only_second: int) -> PairedTest:
    """Test whether two models differ on the same images (exact two-sided McNemar test, McNemar 1947).

    Args:
        only_first: images that the first model alone gets right.
        only_second: images that the second model alone gets right.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"counts must not be negative, got {only_first} and {only_second}")
    from scipy.special import bdtr

    total = only_first + only_second
    p_value = 1.0 if total == 0 else min(1.0, 2 * float(bdtr(min(only_first, only_second), total, 0.5)))
    return PairedTest(only_first=only_first, only_second=only_second, p_value=p_value)


def format_percent(share: float, *, digits: int = 2) -> str:
    """Return a share in [0, 1] as percent without a sign, e.g. ``45.20``."""
    return f"{100 * share:.{digits}f}"


def format_interval(low: float, high: float, *, digits: int = 1) -> str:
    """Return an interval of shares in percent, e.g. ``44.2–46.2``."""
    return f"{100 * low:.{digits}f}–{100 * high:.{digits}f}"
