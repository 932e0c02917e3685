"""Run one evaluation: shard the samples, attack, keep every row, return the same numbers on every rank.

The number does not depend on world size, batch size, or on how often the job was stopped. What is measured is a
``Subject`` under a protocol, how the work is done an ``Execution``; what the numbers mean together is ``worst_case.py``
and ``verdicts.py``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from distributed_at.config import AttackConfig, EvaluationEntry
from distributed_at.errors import ConfigError
from distributed_at.evaluation.heartbeat import Heartbeat
from distributed_at.evaluation.isolation import Model, device_of, lent
from distributed_at.evaluation.kinds import KINDS
from distributed_at.evaluation.ledger import SUMMARY_FILE, Ledger
from distributed_at.evaluation.protocol import Protocol, build_protocol, ids_hash
from distributed_at.evaluation.result import EvaluationResult
from distributed_at.evaluation.row_maker import RowMaker
from distributed_at.evaluation.rows import Rows, concatenate, empty_rows
from distributed_at.evaluation.sharding import Shard, union
from distributed_at.evaluation.source import Source, describe_pixels, evaluation_ids
from distributed_at.evaluation.step_counts import FewerSteps
from distributed_at.evaluation.weights import weights_hash
from distributed_at.files import write_atomically

Progress = Callable[[int, int], None]
DEFAULT_BATCH_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured.

    Attributes:
        network: any ``nn.Module`` or function that maps images (N, 3, H, W) in [0, 1] to logits (N, K); a module is
            borrowed, and returned bitwise unchanged.
        description: for the protocol: what the weights do not tell (activation, normalisation of pixels); best the
            model's whole configuration as JSON.
        branch: norm branch; None = the entry's.
        training_attack: threat of an entry that names none of its own.
        seed: of starts and targets.
        weights: what stands for a plain function's weights in the protocol; one whose rows are kept needs it.
    """

    network: Model
    description: str = ""
    branch: str | None = None
    training_attack: AttackConfig | None = None
    seed: int = 0
    weights: str | None = None

    def identity(self, *, kept: bool) -> str:
        """Return what the protocol calls the weights: their hash, or for a plain function the name that it was given.

        Raises:
            ConfigError: a plain function without a name, whose rows are ``kept`` for later.
        """
        if isinstance(self.network, nn.Module):
            return weights_hash(self.network)
        if self.weights is None and kept:
            raise ConfigError(
                "weights: a plain function's weights cannot be hashed, and folder keeps its rows for later: "
                "give weights='a name of these weights', or evaluate an nn.Module"
            )
        return self.weights or "function"


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the work is done; nothing here changes a number.

    Attributes:
        folder: ``evaluations`` folder, below which each protocol keeps its rows, so that finished samples are never
            computed again; None keeps nothing.
        device: None = where the network's first parameter is.
        batch_size: images at once; None = the entry's.
        rank, world_size: None = torch.distributed's, else a single process.
        on_progress: called as (samples done, samples of this rank) after each batch.
        alive: called before each forward pass, and while this rank waits for others that get on: a watchdog's ``beat``.
    """

    folder: Path | None = None
    device: torch.device | str | None = None
    batch_size: int | None = None
    rank: int | None = None
    world_size: int | None = None
    on_progress: Progress | None = None
    alive: Callable[[], None] = field(default=lambda: None)


def evaluate_entry(
    subject: Subject,
    source: Source,
    entry: EvaluationEntry,
    *,
    ids: np.ndarray | None = None,
    execution: Execution | None = None,
) -> list[EvaluationResult]:
    """Measure an entry of a recipe: one result, or one a number of steps where it names several, rising.

    Every number is that of ``evaluate`` on the single protocol, sample by sample.

    Raises:
        ConfigError: as ``evaluate``.
    """
    execution = execution or Execution()
    *fewer, longest = KINDS[entry.kind].single_entries(entry)
    if not fewer:
        return [evaluate(subject, source, longest, ids=ids, execution=execution)]
    counts = {one.attack.num_steps: one for one in fewer if one.attack is not None}
    on_the_way = FewerSteps({count: one.name or "" for count, one in counts.items()})
    last = evaluate(subject, source, longest, ids=ids, execution=execution, on_the_way=on_the_way)
    return [
        # what an interrupted pass did not write is computed here, on its own
        *(
            evaluate(subject, source, one, ids=ids, execution=execution, given=on_the_way.rows(count))
            for count, one in counts.items()
        ),
        last,
    ]


def evaluate(
    subject: Subject,
    source: Source,
    what: EvaluationEntry | Protocol,
    *,
    ids: np.ndarray | None = None,
    execution: Execution | None = None,
    settings: Mapping[str, Any] | None = None,
    on_the_way: FewerSteps | None = None,
    given: Rows | None = None,
) -> EvaluationResult:
    """Measure clean or robust accuracy of a network on ``source``.

    Clean predictions come first; an untargeted attack then runs on correctly classified samples alone, which is
    exact, because the clean image is in the ball. Where torch.distributed runs, every rank must call this with the
    same arguments, and all return the same result.

    Args:
        source: where images come from.
        what: an evaluation of a recipe, or a finished protocol (checked against the network and the ids).
        ids: sample ids to measure; None = ``what.num_samples`` of the split, or all of it.
        settings: values of the protocol's own fields that no recipe says, e.g. AutoAttack's ``chunk_size``.
        on_the_way: takes the rows of the same attack at fewer steps.
        given: rows of this protocol that this rank already made; they are not computed again.

    Raises:
        ConfigError: where the protocol does not describe this network and these samples.
        LedgerConflictError: where the folder holds rows that contradict one another.
    """
    started = time.monotonic()
    execution = execution or Execution()
    device = torch.device(execution.device) if execution.device is not None else device_of(subject.network)
    shard = Shard.here(execution.rank, execution.world_size, device)
    if ids is None:
        ids = evaluation_ids(source, None if isinstance(what, Protocol) else what.num_samples)
    ids = np.unique(np.asarray(ids, dtype=np.int64))
    if not len(ids):
        raise ConfigError("ids: an evaluation needs at least one sample, got none")
    weights = subject.identity(kept=execution.folder is not None)
    shard.require_equal("the weights to evaluate", weights)
    protocol = _protocol(subject, weights, source, what, ids, device, settings or {})
    shard.require_equal("the protocol", protocol.hash)
    batch_size = execution.batch_size or (DEFAULT_BATCH_SIZE if isinstance(what, Protocol) else what.batch_size)

    ledger = _ledger(shard, execution.folder, protocol)
    if on_the_way is not None:
        on_the_way.open(protocol, execution.folder)
    # connected ranks get from the first what it read; others may see a folder at different times, and read themselves
    reads = ledger if shard.rank == 0 or not shard.connected else None
    known = shard.together(lambda: _known(reads, given, ids))
    known = union(shard, known, ids, protocol.attacks)
    heartbeat = Heartbeat(shard, execution.alive)
    counts = on_the_way.counts if on_the_way is not None else ()
    row_maker = RowMaker(subject.network, source, protocol, device, batch_size, counts, beat=heartbeat.beat)

    def share() -> Rows:
        try:
            return _compute(row_maker, shard, ids, known, ledger, execution.on_progress, on_the_way)
        finally:
            heartbeat.wait()

    with lent(subject.network, protocol.branch):
        fresh = shard.together(share)
    everything = union(shard, fresh, ids, protocol.attacks)
    computed = len(everything)
    if ledger is not None and not shard.connected:
        everything = _stored(ledger, ids)  # processes that share only the folder see each other's rows here
    elif len(known):
        everything = concatenate([known, everything]).by_id()
    before = 0.0 if ledger is None else ledger.seconds()
    seconds = time.monotonic() - started if computed else 0.0
    result = EvaluationResult(
        protocol=protocol,
        rows=everything,
        seconds=before + seconds,
        computed=computed,
        expected=len(ids),
    )
    if ledger is not None and result.complete and (shard.rank == 0 or not shard.connected):
        write_atomically(ledger.folder / SUMMARY_FILE, json.dumps(result.summary(), indent=1, sort_keys=True) + "\n")
    return result


def _protocol(
    subject: Subject,
    weights: str,
    source: Source,
    what: EvaluationEntry | Protocol,
    ids: np.ndarray,
    device: torch.device,
    settings: Mapping[str, Any],
) -> Protocol:
    """Return the protocol of this evaluation; a finished one is checked against the network and the samples."""
    if isinstance(what, Protocol):
        if what.weights != weights:
            raise ConfigError(f"the protocol is of weights {what.weights[:12]}, but the model has {weights[:12]}")
        if what.data_ids != ids_hash(ids):
            raise ConfigError(
                f"the protocol is over {what.num_samples} other samples than the {len(ids)} given; pass its ids"
            )
        return what
    return build_protocol(
        what,
        weights=weights,
        ids=ids,
        num_classes=source.num_classes,
        training_attack=subject.training_attack,
        model=subject.description,
        branch=subject.branch,
        dataset=getattr(source, "name", ""),
        split=source.split,
        preprocessing=describe_pixels(source),
        seed=subject.seed,
        device=device,
        **settings,
    )


def _ledger(shard: Shard, folder: Path | None, protocol: Protocol) -> Ledger | None:
    """Return the protocol's ledger below ``folder``; of connected ranks the first makes it, and the others find it."""
    if folder is None:
        return None
    if shard.connected:
        shard.together(lambda: Ledger.of(folder, protocol) if shard.rank == 0 else None)
    return Ledger.of(folder, protocol)


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


def _compute(
    row_maker: RowMaker,
    shard: Shard,
    ids: np.ndarray,
    known: Rows,
    ledger: Ledger | None,
    on_progress: Progress | None,
    on_the_way: FewerSteps | None = None,
) -> Rows:
    """Compute this rank's share of the rows that are missing, storing each piece as soon as it is done."""
    kind = KINDS[row_maker.protocol.kind]
    missing = np.setdiff1d(ids, known.sample_id)
    # Connected ranks agree on what is missing. Others may look at the folder at different times, so they deal out
    # pieces of the whole set and each skips what is there.
    dealt = missing if shard.connected else ids
    mine = shard.mine(kind.pieces(row_maker.protocol, ids, dealt, row_maker.batch_size))
    total = sum(int(np.isin(piece, missing).sum()) for piece in mine)
    parts: list[Rows] = []
    done = 0
    for piece in mine:
        wanted = piece[np.isin(piece, missing)]
        if not len(wanted):
            continue
        rows, fewer = row_maker.rows(piece if kind.batch_dependent else wanted)
        rows = rows.take(np.isin(rows.sample_id, wanted))
        if on_the_way is not None:
            for count, found in fewer.items():
                on_the_way.add(count, found)
        if ledger is not None:
            ledger.append(rows)
        parts.append(rows)
        done += len(wanted)
        if on_progress is not None:
            on_progress(done, total)
    return concatenate(parts)
