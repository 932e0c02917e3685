"""Clean and robust accuracy with their protocol: sharded over ranks, resumable by sample, the same number each time.

Names are imported when they are first used, because the schema of a recipe asks this package for the kinds of
evaluation, and a recipe is read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed_at.evaluation.examination import examine
    from distributed_at.evaluation.kinds import KINDS
    from distributed_at.evaluation.ledger import Ledger, LedgerConflictError
    from distributed_at.evaluation.protocol import Protocol, build_protocol, ids_hash
    from distributed_at.evaluation.result import EvaluationResult
    from distributed_at.evaluation.rows import Rows
    from distributed_at.evaluation.runner import Execution, Subject, evaluate, evaluate_entry
    from distributed_at.evaluation.source import evaluation_ids
    from distributed_at.evaluation.verdicts import Verdict, judge
    from distributed_at.evaluation.weights import weights_hash
    from distributed_at.evaluation.worst_case import WorstCase, worst_cases
    from distributed_at.statistics import wilson

_HOMES = {
    "examination": ("examine",),
    "kinds": ("KINDS",),
    "ledger": ("Ledger", "LedgerConflictError"),
    "protocol": ("Protocol", "build_protocol", "ids_hash"),
    "result": ("EvaluationResult",),
    "rows": ("Rows",),
    "runner": ("Execution", "Subject", "evaluate", "evaluate_entry"),
    "source": ("evaluation_ids",),
    "verdicts": ("Verdict", "judge"),
    "weights": ("weights_hash",),
    "worst_case": ("WorstCase", "worst_cases"),
}

__all__ = [
    "KINDS",
    "EvaluationResult",
    "Execution",
    "Ledger",
    "LedgerConflictError",
    "Protocol",
    "Rows",
    "Subject",
    "Verdict",
    "WorstCase",
    "build_protocol",
    "evaluate",
    "evaluate_entry",
    "evaluation_ids",
    "examine",
    "ids_hash",
    "judge",
    "weights_hash",
    "wilson",
    "worst_cases",
]


def __getattr__(name: str) -> Any:
    if name == "wilson":
        return importlib.import_module("distributed_at.statistics").wilson
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
