"""PGD at several numbers of steps in one pass: the first k of n steps are PGD-k itself, where both step alike.

Each number of steps is a protocol of its own, with the hash, ledger and rows that it would have had alone; only the
attack is shared, so PGD-{20, 100, 500, 2000} (Xie & Yuille 2020, table 7) cost what PGD-2000 costs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distributed_at.config import EvalAttackConfig
from distributed_at.errors import ConfigError
from distributed_at.evaluation.quiet import Model
from distributed_at.evaluation.result import EvaluationResult
from distributed_at.evaluation.runner import evaluate
from distributed_at.evaluation.siblings import Siblings
from distributed_at.evaluation.source import Source


def singles(what: EvalAttackConfig) -> list[EvalAttackConfig]:
    """Return an entry of a recipe as one entry a number of steps, rising; itself where it names no ``checkpoints``.

    A name that holds the number of steps gets each one's own (``pgd2000`` -> ``pgd20``); others get it appended.
    """
    if not what.checkpoints:
        return [what]
    assert what.attack is not None
    steps, name = what.attack.num_steps, what.name
    shared = {"step_size": what.attack.effective_step_size, "step_rule": "explicit"}
    found = []
    for count in what.checkpoints:
        own = (
            None if name is None else name.replace(str(steps), str(count)) if str(steps) in name else f"{name}-{count}"
        )
        attack = what.attack.model_copy(update={**shared, "num_steps": count})
        found.append(what.model_copy(update={"checkpoints": (), "name": own, "attack": attack}))
    return [*found, what.model_copy(update={"checkpoints": ()})]


def evaluate_entry(
    model: Model, source: Source, what: EvalAttackConfig, *, folder: Path | None = None, **arguments: Any
) -> list[EvaluationResult]:
    """Measure an entry of a recipe: one result, or one a number of steps where it names ``checkpoints``, rising.

    Every number is that of ``evaluate`` on the single protocol, sample by sample. Arguments are those of ``evaluate``.

    Raises:
        ConfigError: as ``evaluate``.
    """
    if not what.checkpoints:
        return [evaluate(model, source, what, folder=folder, **arguments)]
    if what.kind != "pgd":
        raise ConfigError(f"checkpoints belong to evaluations of kind 'pgd', this one is {what.kind!r}")
    *fewer, longest = singles(what)
    siblings = Siblings({one.attack.num_steps: one.name for one in fewer if one.attack is not None})
    last = evaluate(model, source, longest, folder=folder, siblings=siblings, **arguments)
    results = []
    for one, count in zip(fewer, siblings.counts, strict=True):
        # what an interrupted pass did not write is computed here, on its own
        results.append(evaluate(model, source, one, folder=folder, given=siblings.rows(count), **arguments))
    return [*results, last]
