"""Tables of measured accuracies, for the terminal and as JSON: the same rows, with keys that do not change.

Keys of a row: ``run, protocol, hash, branch, split, metric, correct, total, accuracy, low, high, seconds, success,
paper, difference, comparable, p_value``. ``success`` is the share that a targeted attack moved to its target, else
null. Shares lie in [0, 1]; ``paper`` (percent) and ``difference`` (ours minus the paper's, percentage points) are null
where the recipe names no number; ``comparable`` is null for the first run. ``p_value`` is that of the exact McNemar test
against the first run on the same images, null where the two are not comparable or their rows by sample are not there.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from distributed_at.catalogue.norms import recorded_norm
from distributed_at.evaluation import KINDS, EvaluationResult, Ledger, worst_cases
from distributed_at.observe.record import Measurement, RunRecord, load_run
from distributed_at.statistics import format_interval, format_percent, mcnemar

KEYS = (
    "run", "protocol", "hash", "branch", "split", "metric", "correct", "total", "accuracy", "low", "high", "seconds",
    "success", "paper", "difference", "comparable", "p_value",
)  # fmt: skip
_SYNONYMS = {"autoattack": "aa", "natural": "clean", "nat": "clean"}


def _plain(name: str) -> str:
    word = re.sub(r"[^a-z0-9]", "", name.lower())
    return _SYNONYMS.get(word, word)


def _aliases(measurement: Measurement) -> set[str]:
    """Short names under which a paper's number may stand: ``clean``, ``aa``, ``pgd20``, ``pgd10x5``."""
    kind = str(measurement.details.get("kind") or "")
    if kind in KINDS:
        return {_plain(name) for name in KINDS[kind].paper_names({**measurement.details, "name": measurement.protocol})}
    name = measurement.protocol.split(" ")[
        0
    ]  # an event of training holds the protocol's name alone: "PGD-20 linf 8/255"
    return {_plain(measurement.protocol), _plain(name), *(["clean"] if measurement.is_clean else [])}


def paper_number(record: RunRecord, measurement: Measurement) -> float | None:
    """Return the paper's number (percent) for a test-set measurement, matched by protocol (``pgd10``, ``aa``, ``clean``).

    A recipe's ``paper.numbers`` may name a branch too (``clean_adv``, ``clean_branch_clean``): that entry wins over the
    plain name. Plain names speak of the branch that faces the attack; they say nothing of a mixture's clean branch.
    """
    if measurement.split not in ("test", ""):
        return None
    aliases = _aliases(measurement)
    branch = _plain(measurement.branch)
    exact = {word for alias in aliases for word in (alias + branch, f"{branch}branch{alias}")} if branch else set()
    for wanted in (
        exact,
        aliases if branch != "clean" or not recorded_norm(record.section("model")).branches else set(),
    ):
        for name, value in record.paper_numbers.items():
            if _plain(str(name)) in wanted:
                return float(value)
    return None


def evaluation_rows(run: RunRecord | Path | str, *, reference: RunRecord | None = None) -> list[dict[str, Any]]:
    """Return one row a measurement of a run; ``reference`` is the run that ``comparable`` speaks of."""
    record = run if isinstance(run, RunRecord) else load_run(run)
    rows = []
    for measurement in record.measurements:
        paper = paper_number(record, measurement)
        comparable = p_value = None
        if reference is not None:
            alike = [m for m in reference.measurements if measurement.comparable(m)]
            comparable = bool(alike)
            p_value = paired_p_value(alike[0], measurement) if alike else None
        row = {
            key: getattr(measurement, key)
            for key in ("protocol", "hash", "branch", "split", "metric", "correct", "total", "accuracy", "low", "high", "seconds", "success")
        }  # fmt: skip
        difference = None if paper is None else 100 * measurement.accuracy - paper
        rows.append(
            {
                "run": record.name,
                **row,
                "paper": paper,
                "difference": difference,
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
        "hash": lambda row: str(row["hash"])[:10],
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
            shown.add_column(name, justify="right", no_wrap=True, style="dim" if name == "hash" else "")
    for row in rows:
        shown.add_row(*(Text(cell(row)) for cell in columns.values()))
    if any(row.get("comparable") is False for row in rows):
        shown.caption = "* measured in another way than the first run: not comparable"
    return shown


def rows_json(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a JSON list with the keys named in this module's description."""
    return json.dumps([{key: row.get(key) for key in KEYS} for row in rows], indent=2, ensure_ascii=False)


def compare(run_folders: Sequence[Path | str | RunRecord]) -> Table:
    """Return the table that sets several runs side by side."""
    return table(compare_rows(run_folders))
