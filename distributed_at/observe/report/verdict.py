"""One sentence on what a run reached, and findings that a reader must know before believing it, from its numbers alone.

Differences are called so only where 95% intervals do not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distributed_at.observe.paper_row import paper_row
from distributed_at.observe.record import Measurement, RunRecord
from distributed_at.observe.verdicts import apart, clean_result, robust_result, run_verdicts, said

_LISTED = 12  # differences that a finding names
Level = Literal["good", "note", "bad"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something the reader should know: how grave it is, what it is, and the numbers behind it."""

    level: Level
    title: str
    text: str


def sentence(record: RunRecord) -> str:
    """Return the verdict line."""
    clean, robust = clean_result(record), robust_result(record)
    place = {"test": "the test set", "validation": "the held-out set"}
    if robust is not None:
        images = place.get(robust.split, robust.split or "the images")
        start = f"{said(robust)} of {images} is classified correctly under {robust.protocol}"
        return start + (f", and {said(clean)} without an attack." if clean is not None else ".")
    if clean is not None:
        return f"{said(clean)} of {place.get(clean.split, clean.split or 'the images')} is classified correctly; no attack was evaluated."
    return "No accuracy has been measured yet."


def findings(record: RunRecord, others: Sequence[RunRecord] = ()) -> list[Finding]:
    """Return what a reader must know, gravest first."""
    found = [Finding(level=v.level, title=v.title, text=v.message) for v in run_verdicts(record)]
    clean, robust = clean_result(record), robust_result(record)
    beside = paper_row(record)
    if beside is not None and beside.differences:
        more = f" and {len(beside.differences) - _LISTED} more" if len(beside.differences) > _LISTED else ""
        listed = "; ".join(beside.differences[:_LISTED]) + more
        found.append(Finding(level="note", title="Not the paper's row", text=f"The recipe differs from it: {listed}."))
    unmeasured = beside.unmeasured(record.measurements) if beside is not None and record.measurements else []
    if unmeasured:
        text = f"The recipe asks for {', '.join(unmeasured)}, which no result of the test images answers."
        found.append(Finding(level="note", title="Not all measured", text=text))
    for one in (clean, robust):
        number = None if one is None or beside is None else beside.number(one)
        if one is None or number is None or one.low is None or one.high is None:
            continue
        inside = one.low <= number / 100 <= one.high
        text = (
            f"{one.protocol}: ours {said(one)}, the paper's {number:.2f}% ({100 * one.accuracy - number:+.2f} points)."
        )
        title = (
            "Agrees with the paper"
            if inside
            else ("Above the paper" if one.accuracy * 100 > number else "Below the paper")
        )
        found.append(Finding(level="good" if inside else "note", title=title, text=text))
    for other in others:
        found += _against(robust, other)
    order = {"bad": 0, "note": 1, "good": 2}
    return sorted(found, key=lambda one: order[one.level])


def _against(robust: Measurement | None, other: RunRecord) -> list[Finding]:
    match = None if robust is None else next((m for m in other.measurements if robust.comparable(m)), None)
    if robust is None or match is None or not apart(robust, match):
        return []
    more = robust.accuracy > match.accuracy
    text = f"{robust.protocol}: {said(robust)} here, {said(match)} there."
    return [
        Finding(
            level="good" if more else "note", title=f"{'More' if more else 'Less'} robust than {other.name}", text=text
        )
    ]
