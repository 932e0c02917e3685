"""Ways to measure a network, one file each: what a recipe may say, what its number depends on, and how it is run.

Importing this, or a kind's file, does not import torch, so that a recipe is read without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from distributed_at.registry import Registry

if TYPE_CHECKING:
    from distributed_at.evaluation.kinds.base import EvaluationKind

KINDS: Registry[type[EvaluationKind]] = Registry(
    "evaluation kind",
    field="evaluation.kind",
    entry="distributed_at.evaluation.kinds.base:EvaluationKind",
    builtin={
        "clean": "distributed_at.evaluation.kinds.clean:Clean",
        "pgd": "distributed_at.evaluation.kinds.pgd:Pgd",
        "autoattack": "distributed_at.evaluation.kinds.autoattack:AutoAttack",
    },
)
