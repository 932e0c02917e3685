"""One sentence on what a run reached, and findings that a reader must know before believing it, from its numbers alone.

Differences are called so only where 95% intervals do not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distributed_at.observe.record import Measurement, RunRecord
from distributed_at.observe.report.curves import held_out
from distributed_at.observe.tables import paper_number
from distributed_at.statistics import format_interval, format_percent

NARROW = "\u00a0"  # no line may break inside a number with its interval
JOINED_DASH = "\u2060–\u2060"

Level = Literal["good", "note", "bad"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something the reader should know: how grave it is, what it is, and the numbers behind it."""

    level: Level
    title: str
    text: str


def _final(record: RunRecord) -> list[Measurement]:
    """Test-set results, or the last held-out ones where the run has no final evaluation yet."""
    test = [m for m in record.measurements if m.split in ("test", "")]
    return test or record.measurements or [found[-1] for found in held_out(record).values()]


def clean_result(record: RunRecord) -> Measurement | None:
    """Return the clean accuracy to quote: of the adversarial branch where there are two, as robustness is measured there."""
    found = [m for m in _final(record) if m.is_clean]
    return next((m for m in found if m.branch in ("adv", "")), found[0] if found else None)


def robust_result(record: RunRecord) -> Measurement | None:
    """Return the robust accuracy to quote: the lowest, of the strongest attack that was run on the most images."""
    found = [m for m in _final(record) if not m.is_clean]
    if not found:
        return None
    most = max(m.total or 0 for m in found)
    return min((m for m in found if (m.total or 0) == most), key=lambda m: m.accuracy)


def _said(one: Measurement) -> str:
    interval = ""
    if one.low is not None and one.high is not None:
        interval = f" (95%{NARROW}interval{NARROW}{format_interval(one.low, one.high).replace('–', JOINED_DASH)})"
    return f"{format_percent(one.accuracy)}%{interval}"


def sentence(record: RunRecord) -> str:
    """Return the verdict line."""
    clean, robust = clean_result(record), robust_result(record)
    place = {"test": "the test set", "validation": "the held-out set"}
    if robust is not None:
        images = place.get(robust.split, robust.split or "the images")
        start = f"{_said(robust)} of {images} is classified correctly under {robust.protocol}"
        return start + (f", and {_said(clean)} without an attack." if clean is not None else ".")
    if clean is not None:
        return f"{_said(clean)} of {place.get(clean.split, clean.split or 'the images')} is classified correctly; no attack was evaluated."
    return "No accuracy has been measured yet."


def _apart(first: Measurement, second: Measurement) -> bool:
    if None in (first.low, first.high, second.low, second.high):
        return False
    return first.low > second.high or second.low > first.high  # type: ignore[operator]


def _progress(record: RunRecord) -> list[Finding]:
    found = []
    bad = [row for row in record.events if row["event"] == "nonfinite"]
    if bad:
        steps = ", ".join(str(row.get("at_step", row.get("step"))) for row in bad[:5])
        found.append(
            Finding(
                level="bad",
                title="Loss not finite",
                text=f"{len(bad)} steps had a NaN or infinite loss (first at step {steps}).",
            )
        )
    for key, rows in held_out(record).items():
        if rows[0].is_clean or len(rows) < 2:
            continue
        best, last = max(rows, key=lambda m: m.accuracy), rows[-1]
        if best is last or not _apart(best, last):
            continue
        numbers = f"{key[1]} on held-out images was {_said(best)} at epoch {best.epoch:.2f} and ended at {_said(last)}."
        if last.accuracy < 0.5 * best.accuracy:
            found.append(Finding(level="bad", title="Robustness collapsed while training", text=numbers))
        else:
            found.append(
                Finding(
                    level="note", title="Robust overfitting", text=numbers + " An earlier checkpoint is more robust."
                )
            )
    return found


def findings(record: RunRecord, others: Sequence[RunRecord] = ()) -> list[Finding]:
    """Return what a reader must know, gravest first."""
    found = _progress(record)
    clean, robust = clean_result(record), robust_result(record)
    classes = record.num_classes
    if clean is not None and classes and clean.low is not None and clean.low <= 1 / classes:
        found.append(
            Finding(
                level="bad",
                title="No better than guessing",
                text=f"Clean accuracy {_said(clean)} with {classes} classes.",
            )
        )
    if (
        clean is not None
        and robust is not None
        and robust.low is not None
        and clean.high is not None
        and robust.low > clean.high
    ):
        found.append(
            Finding(
                level="bad",
                title="Attack makes it better",
                text=f"{robust.protocol} leaves {_said(robust)} right, more than the clean {_said(clean)}: the attack does not work.",
            )
        )
    if robust is not None and classes and robust.high is not None and robust.high < 1 / classes:
        found.append(
            Finding(
                level="note",
                title="Not robust",
                text=f"{robust.protocol} leaves {_said(robust)}, less than guessing among {classes} classes.",
            )
        )
    for one in (clean, robust):
        number = None if one is None else paper_number(record, one)
        if one is None or number is None or one.low is None or one.high is None:
            continue
        inside = one.low <= number / 100 <= one.high
        text = (
            f"{one.protocol}: ours {_said(one)}, the paper's {number:.2f}% ({100 * one.accuracy - number:+.2f} points)."
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
    if robust is None or match is None or not _apart(robust, match):
        return []
    more = robust.accuracy > match.accuracy
    text = f"{robust.protocol}: {_said(robust)} here, {_said(match)} there."
    return [
        Finding(
            level="good" if more else "note", title=f"{'More' if more else 'Less'} robust than {other.name}", text=text
        )
    ]
