"""Run one evaluation: shard the samples, attack, keep every row, return the same numbers on every rank.

The number does not depend on world size, batch size, or on how often the job was stopped. Which attack runs is
``protocol.py``; what the numbers mean together is ``worst_case.py`` and ``verdicts.py``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from distributed_at.config import AttackConfig, EvalAttackConfig
from distributed_at.errors import ConfigError
from distributed_at.evaluation.ledger import Ledger
from distributed_at.evaluation.protocol import AUTOATTACK_CHUNK, Protocol, build_protocol, ids_hash
from distributed_at.evaluation.pulse import Pulse
from distributed_at.evaluation.quiet import Model, device_of, lent
from distributed_at.evaluation.result import EvaluationResult
from distributed_at.evaluation.rows import Rows, concatenate, empty_rows
from distributed_at.evaluation.sharding import Shard, union
from distributed_at.evaluation.siblings import Siblings
from distributed_at.evaluation.source import Source, describe_pixels, evaluation_ids
from distributed_at.evaluation.weights import weights_hash
from distributed_at.evaluation.work import Work
from distributed_at.files import write_atomically

Progress = Callable[[int, int], None]


def evaluate(
    model: Model,
    source: Source,
    what: EvalAttackConfig | Protocol,
    *,
    training_attack: AttackConfig | None = None,
    ids: np.ndarray | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    folder: Path | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    branch: str | None = None,
    seed: int = 0,
    architecture: str = "",
    preprocessing: str | None = None,
    chunk_size: int = AUTOATTACK_CHUNK,
    on_progress: Progress | None = None,
    alive: Callable[[], None] = lambda: None,
    siblings: Siblings | None = None,
    given: Rows | None = None,
    weights: str | None = None,
) -> EvaluationResult:
    """Measure clean or robust accuracy of ``model`` on ``source``.

    Clean predictions come first; an untargeted attack then runs on correctly classified samples alone, which is
    exact, because the clean image is in the ball. Where torch.distributed runs, every rank must call this with the
    same arguments, and all return the same result. With ``folder``, rows are kept in a ledger and finished samples
    are never computed again.

    Args:
        model: any ``nn.Module`` or function that maps x (N, 3, H, W) in [0, 1] to logits (N, K); a module is borrowed, and
            returned bitwise unchanged.
        source: where images come from.
        what: an evaluation of a recipe, or a finished protocol (checked against the model and the ids).
        training_attack: threat of an evaluation that names none of its own.
        ids: sample ids to measure; None = ``what.num_samples`` of the split, or all of it.
        rank, world_size: None = torch.distributed's, else a single process.
        folder: ``evaluations`` folder; this protocol's own folder is made below it.
        batch_size: images at once; None = the configuration's. It does not change the result.
        device: None = where the model's first parameter is.
        branch: overrides the configuration's.
        seed: of starts and targets.
        architecture: for the protocol: what the weights do not tell (activation, normalisation of pixels); best the
            model's whole configuration as JSON.
        preprocessing: for the protocol; None = what the source says of its pixels.
        chunk_size: samples that AutoAttack treats together; part of the protocol, so change it only where a chunk does
            not fit in memory.
        on_progress: called as (samples done, samples of this rank) after each batch.
        alive: called before each forward pass, and while this rank waits for others that get on: a watchdog's ``beat``.
        siblings: takes the rows of the same attack at fewer steps (``step_counts.py``).
        given: rows of this protocol that this rank already made; they are not computed again.
        weights: what stands for a plain function's weights in the protocol; with ``folder`` such a function needs it.

    Raises:
        ConfigError: where the protocol does not describe this model and these samples.
        LedgerConflictError: where the folder holds rows that contradict one another.
    """
    started = time.monotonic()
    on = torch.device(device) if device is not None else device_of(model)
    shard = Shard.here(rank, world_size, on)
    if ids is None:
        ids = evaluation_ids(source, what.num_samples if isinstance(what, EvalAttackConfig) else None)
    ids = np.unique(np.asarray(ids, dtype=np.int64))
    if not len(ids):
        raise ConfigError("ids: an evaluation needs at least one sample, got none")
    weights = _identity(model, weights, folder)
    shard.require_equal("the weights to evaluate", weights)
    if isinstance(what, Protocol):
        protocol = what
        _check_protocol(protocol, weights, ids)
    else:
        protocol = build_protocol(
            what,
            weights=weights,
            ids=ids,
            num_classes=source.num_classes,
            training_attack=training_attack,
            model=architecture,
            branch=branch,
            dataset=getattr(source, "name", ""),
            split=source.split,
            preprocessing=describe_pixels(source) if preprocessing is None else preprocessing,
            seed=seed,
            device=on,
            chunk_size=chunk_size,
        )
    shard.require_equal("the protocol", protocol.hash)
    batch_size = batch_size or (what.batch_size if isinstance(what, EvalAttackConfig) else 256)

    ledger = Ledger.open(folder / protocol.folder_name, protocol) if folder is not None else None
    if siblings is not None:
        siblings.open(protocol, folder)
    known = shard.together(lambda: _known(ledger, given, ids))
    known = union(shard, known, ids, protocol.attacks)
    pulse = Pulse(shard, alive)
    counts = siblings.counts if siblings is not None else ()
    work = Work(model, source, protocol, on, batch_size, counts, beat=pulse.beat)

    def share() -> Rows:
        try:
            return _compute(work, shard, ids, known, ledger, on_progress, siblings)
        finally:
            pulse.wait()

    with lent(model, protocol.branch):
        fresh = shard.together(share)
    everything = union(shard, fresh, ids, protocol.attacks)
    computed = len(everything)
    if ledger is not None and not shard.connected:
        everything = _stored(ledger, ids)  # processes that share only the folder see each other's rows here
    elif len(known):
        everything = concatenate([known, everything]).by_id()
    result = EvaluationResult(
        protocol=protocol,
        rows=everything,
        seconds=time.monotonic() - started,
        computed=computed,
        expected=len(ids),
    )
    if ledger is not None and result.complete and (shard.rank == 0 or not shard.connected):
        write_atomically(ledger.folder / "summary.json", json.dumps(result.summary(), indent=1, sort_keys=True) + "\n")
    return result


def _identity(model: Model, weights: str | None, folder: Path | None) -> str:
    """Return what the protocol calls the weights: their hash, or for a plain function the name that it was given."""
    if isinstance(model, nn.Module):
        return weights_hash(model)
    if weights is None and folder is not None:
        raise ConfigError(
            "weights: a plain function's weights cannot be hashed, and folder keeps its rows for later: "
            "give weights='a name of these weights', or evaluate an nn.Module"
        )
    return weights or "function"


def _check_protocol(protocol: Protocol, weights: str, ids: np.ndarray) -> None:
    if protocol.weights != weights:
        raise ConfigError(f"the protocol is of weights {protocol.weights[:12]}, but the model has {weights[:12]}")
    if protocol.data_ids != ids_hash(ids):
        raise ConfigError(
            f"the protocol is over {protocol.num_samples} other samples than the {len(ids)} given; pass its ids"
        )


def _stored(ledger: Ledger | None, ids: np.ndarray) -> Rows:
    """Return the rows of ``ids`` that the ledger already holds."""
    if ledger is None:
        return empty_rows()
    rows = ledger.read()
    return rows.take(np.isin(rows.sample_id, ids))


def _known(ledger: Ledger | None, given: Rows | None, ids: np.ndarray) -> Rows:
    """Return the rows that need no work: those in the ledger, and those that the caller holds."""
    stored = _stored(ledger, ids)
    if given is None or not len(given):
        return stored
    return concatenate([stored, given.take(~np.isin(given.sample_id, stored.sample_id))]).by_id()


def _pieces(protocol: Protocol, ids: np.ndarray, missing: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Cut the missing ids into pieces of work: batches, or for AutoAttack every fixed chunk that lacks a row."""
    if protocol.kind != "autoattack":
        return [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    size = protocol.chunk_size
    chunks = [ids[i : i + size] for i in range(0, len(ids), size)]
    return [chunk for chunk in chunks if np.isin(chunk, missing).any()]


def _compute(
    work: Work,
    shard: Shard,
    ids: np.ndarray,
    known: Rows,
    ledger: Ledger | None,
    on_progress: Progress | None,
    siblings: Siblings | None = None,
) -> Rows:
    """Compute this rank's share of the rows that are missing, storing each piece as soon as it is done."""
    missing = np.setdiff1d(ids, known.sample_id)
    # Connected ranks agree on what is missing. Others may look at the folder at different times, so they deal out
    # pieces of the whole set and each skips what is there.
    dealt = missing if shard.connected else ids
    mine = shard.mine(_pieces(work.protocol, ids, dealt, work.batch_size))
    total = sum(int(np.isin(piece, missing).sum()) for piece in mine)
    parts: list[Rows] = []
    done = 0
    for piece in mine:
        wanted = piece[np.isin(piece, missing)]
        if not len(wanted):
            continue
        found = work.rows_by_steps(piece if work.protocol.kind == "autoattack" else wanted)
        rows = found.pop(work.protocol.num_steps)
        rows = rows.take(np.isin(rows.sample_id, wanted))
        if siblings is not None:
            for count, fewer in found.items():
                siblings.add(count, fewer)
        if ledger is not None:
            ledger.append(rows)
        parts.append(rows)
        done += len(wanted)
        if on_progress is not None:
            on_progress(done, total)
    return concatenate(parts)
