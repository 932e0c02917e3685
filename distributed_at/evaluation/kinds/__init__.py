"""Ways to measure a network, one file each: what a recipe may say, what its number depends on, and how it is run.

Importing this, or a kind's file, does not import torch, so that a recipe is read without it.
"""

from __future__ import annotations

from typing import cast

from distributed_at.catalogue import evaluations as catalogue
from distributed_at.evaluation.kinds.base import EvaluationKind
from distributed_at.registry import Registry

KINDS = cast(Registry[type[EvaluationKind]], catalogue.KINDS)
