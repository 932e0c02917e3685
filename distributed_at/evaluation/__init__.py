"""Clean and robust accuracy with their protocol: sharded over ranks, resumable by sample, the same number each time."""

from distributed_at.evaluation.step_counts import evaluate_entry
from distributed_at.evaluation.curve import CurvePoint, pgd_curve
from distributed_at.evaluation.ledger import Ledger, LedgerConflictError
from distributed_at.evaluation.protocol import Protocol, build_protocol, ids_hash
from distributed_at.evaluation.result import EvaluationResult
from distributed_at.evaluation.rows import Rows
from distributed_at.evaluation.runner import evaluate
from distributed_at.evaluation.source import evaluation_ids
from distributed_at.evaluation.verdicts import Verdict, judge
from distributed_at.evaluation.weights import weights_hash
from distributed_at.evaluation.worst_case import WorstCase, worst_case, worst_cases
from distributed_at.statistics import wilson

__all__ = [
    "CurvePoint",
    "EvaluationResult",
    "Ledger",
    "LedgerConflictError",
    "Protocol",
    "Rows",
    "Verdict",
    "WorstCase",
    "build_protocol",
    "evaluate",
    "evaluate_entry",
    "evaluation_ids",
    "ids_hash",
    "judge",
    "pgd_curve",
    "weights_hash",
    "wilson",
    "worst_case",
    "worst_cases",
]
