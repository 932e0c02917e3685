"""Saves and finds checkpoints that exist wholly or not at all, on any number of ranks, in the background if asked.

It stores named tensors and JSON; which tensors make up a training state is ``checkpoint_state``'s business. Its folder
belongs to one live run: hold the run's lock (``engine.runs.lock``) before making a manager.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from distributed_at.engine.checkpoint import files
from distributed_at.engine.checkpoint.examination import examine, probe
from distributed_at.engine.checkpoint.files import BadCheckpoint, Manifest
from distributed_at.engine.checkpoint.ranks import SHOWN, Ranks, attempt, came_from_outside, merge
from distributed_at.engine.checkpoint.reader import PlainWriter, SafeReader
from distributed_at.engine.checkpoint.retention import prune, read_best, write_best
from distributed_at.engine.checkpoint.shards import (
    FlatLoadPlanner,
    FlatSavePlanner,
    FlatShard,
    as_shards,
    complete,
    mismatches,
    snapshot,
)
from distributed_at.errors import CheckpointError, first_line

warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

EventSink = Callable[[str, dict[str, Any]], None]
_LONGEST_WAIT = 900.0  # seconds between attempts while the disk refuses


class UnreadableCheckpoint(CheckpointError):
    """Its files are those that it lists, and still they cannot be loaded: somebody else's list, or a fault of ours."""


@dataclass(frozen=True)
class SaveResult:
    """What became of one save; equal on all ranks. ``failures`` is empty exactly where the checkpoint exists."""

    step: int
    path: Path
    num_bytes: int
    seconds_blocked: float  # training stood still
    seconds_durable: float  # from the call until the checkpoint could not be lost
    failures: tuple[str, ...] = ()
    skipped: bool = False  # not tried: waiting after an earlier failure

    @property
    def ok(self) -> bool:
        """Whether the checkpoint exists."""
        return not self.failures and not self.skipped


class CheckpointManager:
    """All ranks make one and call its methods in the same order (``poll`` excepted, which talks to nobody).

    ``keep``: newest checkpoints kept (at least 2); ``keep_every_epochs``: also keep the first one of every so many
    epochs, by ``metadata["epoch"]``; ``on_event(kind, fields)``: called on rank 0, in the calling thread;
    ``retry_seconds``: wait after the first failed save, doubled at each further one.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        keep: int = 2,
        keep_every_epochs: float | None = None,
        on_event: EventSink | None = None,
        retry_seconds: float = 30.0,
        timeout_seconds: float = 1800.0,
    ) -> None:
        if keep < 2:
            raise CheckpointError(
                f"checkpoint.keep is {keep}; at least 2 are kept, so that one bad file loses one save"
            )
        self.root = Path(root)
        self.ranks = Ranks(timeout_seconds=timeout_seconds)
        self._keep, self._keep_every_epochs = keep, keep_every_epochs
        self._on_event = on_event
        self._retry_seconds = retry_seconds
        self._failures_in_row = 0
        self._next_try = 0.0  # monotonic seconds, rank 0's
        self._buffers: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._finished: SaveResult | None = None
        self._verified: set[Path] = set()
        self._unreadable: dict[Path, BadCheckpoint] = {}  # whose files are as listed, and could not be loaded
        self._bad: list[Path] = []  # to be set aside at the first save: a mere reader changes nothing
        self._tidied = False

    # ------------------------------------------------------------------ saving

    def save(
        self,
        step: int,
        tensors: Mapping[str, torch.Tensor | FlatShard],
        metadata: Mapping[str, Any],
        *,
        asynchronous: bool = False,
        force: bool = False,
    ) -> SaveResult | None:
        """Save a checkpoint; a full or failing disk is an event, never an exception.

        ``tensors``: the same names on all ranks; ``metadata``: JSON, rank 0's is stored. Asynchronously, returns None
        once the state is copied, and the result comes from ``poll`` or ``wait``. After a failure, saves are skipped
        until the wait is over unless ``force`` (use it for the last save before leaving).
        """
        began = time.monotonic()
        self.wait()
        text = json.dumps(dict(metadata), allow_nan=False)  # refuses here, on the caller's line, what is not JSON
        wait = self.ranks.broadcast(max(0.0, self._next_try - time.monotonic()))
        if wait > 0 and not force:
            self._event("warning", code="checkpoint_postponed", step=step, message=f"next attempt in {wait:.0f} s")
            return SaveResult(step, self.root / files.step_name(step), 0, time.monotonic() - began, 0.0, skipped=True)
        failure: str | None = None
        rank, world_size = self.ranks.rank, self.ranks.world_size
        shards = {name: held.share(name, rank, world_size) for name, held in as_shards(tensors).items()}
        if asynchronous:
            try:
                shards = snapshot(shards, self._buffers)
            except (MemoryError, RuntimeError) as error:
                failure = f"no memory for a copy of the state: {error}"

        blocked = [time.monotonic() - began]

        def work() -> None:
            failures, size = self._write(step, shards, json.loads(text), failure)
            now = time.monotonic()
            blocked_for = blocked[0] if asynchronous else now - began
            path = self.root / files.step_name(step)
            self._finished = SaveResult(step, path, size, blocked_for, now - began, tuple(failures))

        if not asynchronous:
            work()
            return self.poll()
        self._thread = threading.Thread(target=work, name=f"checkpoint-{step}")
        blocked[0] = time.monotonic() - began
        self._thread.start()
        return None

    def poll(self) -> SaveResult | None:
        """Return the result of a save that has ended since the last call, else None; never waits, tells no rank."""
        if self._thread is not None:
            if self._thread.is_alive():
                return None
            self._thread.join()
            self._thread = None
        result, self._finished = self._finished, None
        if result is not None:
            self._report(result)
        return result

    def wait(self) -> SaveResult | None:
        """Wait for a save in the background and return its result; call it before leaving."""
        if self._thread is not None:
            self._thread.join()
        return self.poll()

    def close(self) -> SaveResult | None:
        """Wait for the last save; call it before the process group is destroyed."""
        result = self.wait()
        self._buffers.clear()
        return result

    def _report(self, result: SaveResult) -> None:
        if result.ok:
            self._failures_in_row, self._next_try = 0, 0.0
            self._verified.add(result.path)
            self._event(
                "checkpoint",
                step=result.step,
                path=str(result.path),
                bytes=result.num_bytes,
                seconds_blocked=round(result.seconds_blocked, 4),
                seconds_durable=round(result.seconds_durable, 4),
            )
            return
        self._failures_in_row += 1
        wait = min(_LONGEST_WAIT, self._retry_seconds * 2 ** (self._failures_in_row - 1))
        self._next_try = time.monotonic() + wait
        told = "; ".join(result.failures[:SHOWN])
        self._event(
            "warning",
            code="checkpoint_failed",
            step=result.step,
            message=f"checkpoint of step {result.step} not written: {told}. Training goes on, older ones are kept; "
            f"next attempt in {wait:.0f} s",
        )

    @property
    def retry_is_due(self) -> bool:
        """Whether the newest save failed, the wait after it is over by this rank's clock, and none is under way."""
        return self._failures_in_row > 0 and self._thread is None and time.monotonic() >= self._next_try

    def _event(self, kind: str, **fields: Any) -> None:
        if self._on_event is not None and self.ranks.is_first:
            self._on_event(kind, fields)

    def _write(
        self, step: int, shards: dict[str, FlatShard], metadata: dict[str, Any], failure: str | None
    ) -> tuple[list[str], int]:
        """Write beside, check, name. Returns (failures, bytes), equal on all ranks; raises only if a rank is lost."""
        temporary = self.root / f".tmp-{files.step_name(step)}"
        try:
            return self._write_agreed(step, shards, metadata, failure, temporary)
        except (
            Exception,
            CheckpointException,
        ) as error:  # a lost peer: the training loop will meet it too; the save must not hide it
            return [f"rank {self.ranks.rank}: {type(error).__name__}: {error}"], 0

    def _write_agreed(
        self, step: int, shards: dict[str, FlatShard], metadata: dict[str, Any], failure: str | None, temporary: Path
    ) -> tuple[list[str], int]:
        ranks = self.ranks
        if ranks.is_first and failure is None:
            self._tidy()
            failure = attempt(lambda: _fresh_folder(temporary))
        if failures := ranks.failures(failure):
            return failures, 0
        writer = PlainWriter(temporary)
        failure = attempt(
            lambda: dcp.save(
                shards,
                storage_writer=writer,
                planner=FlatSavePlanner(),
                process_group=ranks.group,
                no_dist=not ranks.distributed,
            )
        )
        failure = writer.disk_error or failure
        mine: dict[str, tuple[int, str]] = {}
        if failure is None:
            failure = attempt(lambda: mine.update(_hash_own(temporary, ranks.rank)))
        reports = ranks.gather((failure, mine))
        failures = [f"rank {r}: {why}" for r, (why, _) in enumerate(reports) if why]
        size = 0
        if ranks.is_first:
            if not failures:
                listed = {name: entry for _, hashed in reports for name, entry in hashed.items()}
                size = sum(n for n, _ in listed.values())
                shapes = {name: list(shard.shape) for name, shard in shards.items() if shard.numel}
                manifest = Manifest(step, ranks.world_size, listed, shapes, metadata, time.time())
                why = attempt(lambda: self._commit(temporary, manifest))
                failures = [f"rank 0: {why}"] if why else []
            if failures:
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                newest = self.root / files.step_name(step)
                attempt(lambda: prune(newest, keep=self._keep, keep_every_epochs=self._keep_every_epochs))
        return ranks.broadcast((failures, size))

    def _commit(self, temporary: Path, manifest: Manifest) -> None:
        files.write_manifest(temporary, manifest)
        files.commit(temporary, self.root / files.step_name(manifest.step))

    def mark_best(self, step: int, value: float) -> None:
        """Keep the checkpoint of ``step`` as the best one (``value``: held-out accuracy) until another is marked."""
        self.wait()
        if self.ranks.is_first and (why := attempt(lambda: write_best(self.root, step, value))):
            self._event("warning", code="checkpoint_best", step=step, message=f"best.json not written: {why}")

    def best(self) -> Path | None:
        """The checkpoint marked best, if it is still there."""
        self.wait()
        found = read_best(self.root) if self.ranks.is_first else None
        return self.ranks.broadcast(found)

    # ----------------------------------------------------------------- finding

    def latest_good(self, *, fresh: bool = False) -> Path | None:
        """Return the newest checkpoint whose every byte is verified, the same on all ranks, or None for a new run.

        Nothing is changed, so that an evaluation may look into a live run's folder; bad ones are reported and renamed
        ``.bad-…`` by the first save. Where checkpoints exist and none is good, CheckpointError names each with its
        reason, unless ``fresh``: then None, and all are set aside.
        """
        self.wait()
        chosen, reasons = self._search(fresh=fresh)
        if chosen is None and reasons and not fresh:
            told = "\n".join(f"  {name}: {why}" for name, why in reasons)
            raise CheckpointError(
                f"no usable checkpoint in {self.root}:\n{told}\nRestore one of them, or start from nothing with --fresh."
            )
        for name, why in reasons:
            self._event("warning", code="checkpoint_bad", message=f"{name} is not used: {why}")
        if chosen is not None:
            self._verified.add(chosen)
        return chosen

    def _search(self, *, fresh: bool) -> tuple[Path | None, list[tuple[str, str]]]:
        reasons: list[tuple[str, str]] = []
        self._bad = []
        listed = None
        if self.ranks.is_first:
            named = files.list_steps(self.root) + files.half_replaced(self.root)
            listed = [folder for _, folder in sorted(named, reverse=True)], files.quarantined(self.root)
        candidates, quarantined = self.ranks.broadcast(listed)  # type: ignore[misc]
        for folder in candidates:
            bad = self._unreadable.get(folder) or examine(folder, self.ranks, content=True)[1]
            if bad is None:
                return folder, reasons
            reasons.append((folder.name, str(bad)))
            if bad.certain or fresh:
                self._bad.append(folder)
        reasons += [(name, "found bad by an earlier start") for name in quarantined]
        return None, reasons

    def _tidy(self) -> None:
        """Once, before the first save: set bad checkpoints aside and remove what an interrupted save left."""
        if not self._tidied:
            self._tidied = True
            for folder in self._bad:
                files.quarantine(folder)
            attempt(lambda: files.sweep(self.root))

    def load(self, path: Path | str, tensors: Mapping[str, torch.Tensor | FlatShard]) -> dict[str, Any]:
        """Fill ``tensors`` in place from a checkpoint written on any number of ranks; returns its metadata.

        Every byte is verified first unless ``latest_good`` or ``save`` of this manager has just vouched for it. Each
        rank reads its share of what all hold alike and its own of the rest.

        Raises:
            CheckpointError: the same on all ranks, where it is not whole or does not fit; nothing is filled then.
            UnreadableCheckpoint: its list is right and its contents are not; ``tensors`` may be filled in part.
        """
        self.wait()
        folder = Path(path)
        shards = as_shards(tensors)
        ranks = self.ranks
        manifest, bad = examine(folder, ranks, content=ranks.broadcast(folder not in self._verified))
        if bad is not None:
            raise CheckpointError(f"cannot use checkpoint {folder}: {bad}")
        assert manifest is not None
        reader = SafeReader(folder, manifest)
        failure = None
        try:
            wrong = mismatches(shards, reader.read_metadata(), manifest.shapes)
            if wrong:
                more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
                failure = "it does not fit this run: " + "; ".join(wrong[:SHOWN]) + more
        except BadCheckpoint as unusable:
            failure = str(unusable)
        if failures := ranks.failures(failure):
            raise CheckpointError(f"cannot use checkpoint {folder}: {merge(failures)}")
        own = {name: shard.share(name, ranks.rank, ranks.world_size) for name, shard in shards.items()}
        failure, outside = None, False
        try:
            dcp.load(
                {name: shard for name, shard in own.items() if shard.local.numel()},
                storage_reader=reader,
                planner=FlatLoadPlanner(),
                no_dist=True,  # each rank knows what it reads, and one that fails tells it below
            )
        except (Exception, CheckpointException) as error:
            failure, outside = first_line(error), came_from_outside(error)
        found = ranks.gather((failure, outside))
        if failures := [f"rank {rank}: {why}" for rank, (why, _) in enumerate(found) if why]:
            told = merge(failures)
            if any(outside for _, outside in found):  # the same bytes may be read another time
                raise CheckpointError(f"cannot read checkpoint {folder}: {told}")
            self._unreadable[folder] = BadCheckpoint(f"cannot be read: {told}")
            raise UnreadableCheckpoint(f"cannot read checkpoint {folder}: {told}")
        if ranks.world_size > 1:
            complete(shards, own, ranks.group)
        with torch.no_grad():
            for shard in shards.values():
                if shard.on_load is not None:
                    shard.on_load()
        return manifest.metadata

    def load_latest(
        self, tensors: Callable[[], Mapping[str, torch.Tensor | FlatShard]]
    ) -> tuple[Path, dict[str, Any]] | None:
        """Fill the state from the newest checkpoint that is good and can be read; None for a new run.

        ``tensors``: called afresh for each attempt. Raises as ``latest_good`` and ``load``.
        """
        while (path := self.latest_good()) is not None:
            try:
                return path, self.load(path, tensors())
            except UnreadableCheckpoint:
                continue  # an older one may be good; the search now passes this one over, and says so
        return None

    def probe(self) -> None:
        """See that checkpoints can be written here; see ``examination.probe``."""
        probe(self.root, self.ranks)


def _fresh_folder(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        shutil.rmtree(path)
    path.mkdir()


def _hash_own(folder: Path, rank: int) -> dict[str, tuple[int, str]]:
    """Read back and hash what this rank wrote (rank 0 also torch's table); the folder is listed by nobody."""
    own = [f"__{rank}_0.distcp", *([".metadata"] if rank == 0 else [])]
    return {name: files.hash_file(folder / name) for name in own if (folder / name).exists()}
