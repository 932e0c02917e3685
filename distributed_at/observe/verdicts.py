"""Verdicts on a run from its record: what its evaluations were found to be, and what its training shows.

Differences are called so only where 95% intervals do not overlap. The list of all verdicts, with titles and gravity, is
``evaluation.verdicts.TITLES``; those on a set of attacks are found there too and kept in the events.
"""

from __future__ import annotations

from collections.abc import Sequence

from distributed_at.evaluation.verdicts import Verdict
from distributed_at.observe.record import Measurement, RunRecord
from distributed_at.statistics import format_interval, format_percent

NARROW = "\u00a0"  # no line may break inside a number with its interval
JOINED_DASH = "\u2060–\u2060"


def _final(record: RunRecord) -> list[Measurement]:
    """Test-set results, or the last held-out ones where the run has no final evaluation yet."""
    test = [m for m in record.measurements if m.split in ("test", "")]
    return test or record.measurements or [found[-1] for found in record.held_out().values()]


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


def said(one: Measurement) -> str:
    """Return an accuracy with its interval, as a sentence holds it."""
    interval = ""
    if one.low is not None and one.high is not None:
        interval = f" (95%{NARROW}interval{NARROW}{format_interval(one.low, one.high).replace('–', JOINED_DASH)})"
    return f"{format_percent(one.accuracy)}%{interval}"


def apart(first: Measurement, second: Measurement) -> bool:
    """Whether two accuracies' intervals do not overlap."""
    if None in (first.low, first.high, second.low, second.high):
        return False
    return first.low > second.high or second.low > first.high  # type: ignore[operator]


def run_verdicts(record: RunRecord, judged: Sequence[Verdict] | None = None) -> list[Verdict]:
    """Return every verdict on a run, gravest first.

    ``judged``: on its set of attacks (``evaluation.judge``); None = what the last evaluation kept in the events. What
    training and the accuracies themselves show is found anew.
    """
    attacks = [v for v in (record.verdicts if judged is None else judged) if v.code not in _OWN]
    return sorted([*attacks, *_training(record), *_accuracies(record)], key=lambda verdict: verdict.level != "bad")


_OWN = {
    "loss_not_finite",
    "robustness_collapsed",
    "robust_overfitting",
    "no_better_than_guessing",
    "attack_improves_accuracy",
    "not_robust",
}


def _training(record: RunRecord) -> list[Verdict]:
    found = []
    bad = [row for row in record.events if row["event"] == "nonfinite"]
    if bad:
        steps = ", ".join(str(row.get("at_step", row.get("step"))) for row in bad[:5])
        text = f"{len(bad)} steps had a NaN or infinite loss (first at step {steps})."
        found.append(Verdict("loss_not_finite", text, {"steps": len(bad)}))
    for key, rows in record.held_out().items():
        if rows[0].is_clean or len(rows) < 2:
            continue
        best, last = max(rows, key=lambda m: m.accuracy), rows[-1]
        if best is last or not apart(best, last):
            continue
        text = f"{key[1]} on held-out images was {said(best)} at epoch {best.epoch:.2f} and ended at {said(last)}."
        numbers = {"best": best.accuracy, "last": last.accuracy}
        if last.accuracy < 0.5 * best.accuracy:
            found.append(Verdict("robustness_collapsed", text, numbers))
        else:
            found.append(Verdict("robust_overfitting", f"{text} An earlier checkpoint is more robust.", numbers))
    return found


def _accuracies(record: RunRecord) -> list[Verdict]:
    found = []
    clean, robust, classes = clean_result(record), robust_result(record), record.num_classes
    if clean is not None and classes and clean.low is not None and clean.low <= 1 / classes:
        text = f"Clean accuracy {said(clean)} with {classes} classes."
        found.append(Verdict("no_better_than_guessing", text, {"clean": clean.accuracy, "guessing": 1 / classes}))
    if clean is not None and robust is not None and robust.accuracy > clean.accuracy and apart(robust, clean):
        text = f"{robust.protocol} leaves {said(robust)} right, more than the clean {said(clean)}: the attack does not work."
        numbers = {"clean": clean.accuracy, "robust": robust.accuracy}
        found.append(Verdict("attack_improves_accuracy", text, numbers))
    if robust is not None and classes and robust.high is not None and robust.high < 1 / classes:
        text = f"{robust.protocol} leaves {said(robust)}, less than guessing among {classes} classes."
        found.append(Verdict("not_robust", text, {"robust": robust.accuracy, "guessing": 1 / classes}))
    return found
