"""Tables of measured accuracies, for the terminal and as JSON: the same rows, with keys that do not change.

Keys of a row: ``run, protocol, hash, protocol_hash, branch, split, metric, correct, total, accuracy, low, high, seconds,
success, paper, difference, paper_differs, comparable, p_value``. ``hash`` is of the result, weights included;
``protocol_hash`` is of how it was measured alone. ``success`` is the share that a targeted attack moved to its target, else
null. Shares lie in [0, 1]; ``paper`` (percent) and ``difference`` (ours minus the paper's, percentage points) are null
where the paper has no number that measures the same, and ``paper_differs`` lists why one that it prints under this name is
another. ``comparable`` is null for the first run. ``p_value`` is that of the exact McNemar test against the first run on the
same images, null where the two are not comparable or their rows by sample are not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from distributed_at.evaluation import EvaluationResult, Ledger, worst_cases
from distributed_at.observe.paper_row import paper_row
from distributed_at.observe.record import Measurement, RunRecord, load_run
from distributed_at.statistics import format_interval, format_percent, mcnemar

KEYS = (
    "run", "protocol", "hash", "protocol_hash", "branch", "split", "metric", "correct", "total", "accuracy", "low", "high",
    "seconds", "success", "paper", "difference", "paper_differs", "comparable", "p_value",
)  # fmt: skip


_LISTED = 12  # differences from a paper's row that a caption names


def evaluation_rows(run: RunRecord | Path | str, *, reference: RunRecord | None = None) -> list[dict[str, Any]]:
    """Return one row a measurement of a run; ``reference`` is the run that ``comparable`` speaks of."""
    record = run if isinstance(run, RunRecord) else load_run(run)
    rows = []
    beside = paper_row(record)
    for measurement in record.measurements:
        paper = None if beside is None else beside.number(measurement)
        differs: list[str] = []
        if beside is not None and paper is None and beside.named(measurement) is not None:
            differs = list(beside.differences)
            if not beside.is_measured_alike(measurement):
                differs.append("the evaluation is not the recipe's")
        comparable = p_value = None
        if reference is not None:
            alike = [m for m in reference.measurements if measurement.comparable(m)]
            comparable = bool(alike)
            p_value = paired_p_value(alike[0], measurement) if alike else None
        row = {
            key: getattr(measurement, key)
            for key in ("protocol", "hash", "protocol_hash", "branch", "split", "metric", "correct", "total", "accuracy", "low", "high", "seconds", "success")
        }  # fmt: skip
        difference = None if paper is None else 100 * measurement.accuracy - paper
        rows.append(
            {
                "run": record.name,
                **row,
                "paper": paper,
                "difference": difference,
                "paper_differs": differs,
                "comparable": comparable,
                "p_value": p_value,
            }
        )
    return rows


def paired_p_value(first: Measurement, second: Measurement) -> float | None:
    """Return the p-value of McNemar's exact test that two models differ on the images that both were measured on."""
    if first.folder is None or second.folder is None:
        return None
    one, other = (Ledger(m.folder, m.hash).read() for m in (first, second) if m.folder is not None)
    _, at_one, at_other = np.intersect1d(one.sample_id, other.sample_id, return_indices=True)
    if not len(at_one):
        return None
    right, also = one.correct_adv[at_one], other.correct_adv[at_other]
    return mcnemar(int((right & ~also).sum()), int((also & ~right).sum())).p_value


def worst_case_rows(run: str, results: Sequence[EvaluationResult]) -> list[dict[str, Any]]:
    """Return a row for each ball that several attacks of ``results`` share: samples that none of them broke."""
    rows = []
    for worst in worst_cases(results):
        first = worst.protocols[0]
        together = hashlib.sha256("".join(sorted(p.hash for p in worst.protocols)).encode()).hexdigest()
        low, high = worst.interval
        rows.append(
            {
                **dict.fromkeys(KEYS), "run": run, "protocol": f"worst of {worst.name}", "hash": together,
                "branch": first.branch, "split": first.split, "metric": "worst_case_accuracy", "correct": worst.correct,
                "total": worst.total, "accuracy": worst.accuracy, "low": low, "high": high,
            }
        )  # fmt: skip
    return rows


def compare_rows(run_folders: Sequence[Path | str | RunRecord]) -> list[dict[str, Any]]:
    """Return the rows of several runs, those of one protocol side by side; the first run is the one compared with."""
    records = [run if isinstance(run, RunRecord) else load_run(run) for run in run_folders]
    rows = [
        row
        for position, record in enumerate(records)
        for row in evaluation_rows(record, reference=records[0] if position else None)
    ]
    first_seen: dict[tuple[Any, ...], int] = {}
    for row in rows:
        first_seen.setdefault((row["protocol"], row["branch"], row["split"], row["metric"]), len(first_seen))
    return sorted(rows, key=lambda r: first_seen[(r["protocol"], r["branch"], r["split"], r["metric"])])


def table(rows: Sequence[dict[str, Any]], *, title: str = "") -> Table:
    """Return the rows as a rich table: percent, counts and 95% intervals; columns that would say nothing are left out."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "run": lambda row: str(row["run"]),
        "protocol": lambda row: str(row["protocol"]),
        "branch": lambda row: str(row["branch"]),
        "split": lambda row: str(row["split"]),
        "accuracy %": lambda row: format_percent(row["accuracy"]) + (" *" if row.get("comparable") is False else ""),
        "95% interval": lambda row: "–" if row["low"] is None else format_interval(row["low"], row["high"]),
        "correct / total": lambda row: "–" if row["total"] is None else f"{row['correct']:,} / {row['total']:,}",
        "target hit %": lambda row: "–" if row["success"] is None else format_percent(row["success"]),
        "paper %": lambda row: "–" if row["paper"] is None else f"{row['paper']:.2f}",
        "difference": lambda row: "–" if row["difference"] is None else f"{row['difference']:+.2f}",
        "p, same images": lambda row: "–" if row["p_value"] is None else f"{row['p_value']:.2g}",
        "protocol hash": lambda row: str(row["protocol_hash"] or "")[:10],
    }
    for name in ("run", "branch", "split"):
        if len({row[name] for row in rows}) == 1:
            del columns[name]
    if all(row["success"] is None for row in rows):
        del columns["target hit %"]
    if all(row["paper"] is None for row in rows):
        del columns["paper %"], columns["difference"]
    if all(row["p_value"] is None for row in rows):
        del columns["p, same images"]
    shown = Table(title=title or None, header_style="bold", title_justify="left", box=SIMPLE_HEAD)
    for name in columns:
        if name in ("run", "protocol", "branch", "split"):
            shown.add_column(name, overflow="fold", min_width=min(24, max(len(columns[name](row)) for row in rows)))
        else:
            shown.add_column(name, justify="right", no_wrap=True, style="dim" if name == "protocol hash" else "")
    for row in rows:
        shown.add_row(*(Text(cell(row)) for cell in columns.values()))
    captions = []
    if any(row.get("comparable") is False for row in rows):
        captions.append("* measured in another way than the first run: not comparable")
    told = list(dict.fromkeys(line for row in rows for line in row.get("paper_differs") or ()))
    if told:
        more = f" and {len(told) - _LISTED} more" if len(told) > _LISTED else ""
        captions.append(f"not set beside the paper's numbers: {'; '.join(told[:_LISTED])}{more}")
    shown.caption = "\n".join(captions) or None
    return shown


def rows_json(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a JSON list with the keys named in this module's description."""
    return json.dumps([{key: row.get(key) for key in KEYS} for row in rows], indent=2, ensure_ascii=False)


def compare(run_folders: Sequence[Path | str | RunRecord]) -> Table:
    """Return the table that sets several runs side by side."""
    return table(compare_rows(run_folders))
