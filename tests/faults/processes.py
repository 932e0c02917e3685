"""Ranks that are killed, stopped, slow or asked to leave: two ranks, and the fault strikes one at a chosen call."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from distributed_at.engine.processes.preemption import EXIT_SECOND_SIGNAL
from distributed_at.errors import EXIT_HANG, EXIT_OK, EXIT_REQUEUE
from tests.faults.faults import SILENT, Bench, Seen, by_rank, fault, told
from tests.faults.harness import Start
from tests.patience import Stuck, wait_until

STEP = "distributed_at.engine.trainer:Trainer._step"
SAVE = "distributed_at.engine.checkpoint.manager:_hash_own"  # a shard is written, the checkpoint has no name yet
EVALUATE = "distributed_at.evaluation.runner:_compute"
VALIDATING = [
    "data.validation_size=24",
    "evaluation.every_epochs=1",
    "evaluation.validation=[{kind: pgd, batch_size: 4, attack: {eps: 51, num_steps: 2, step_size: 25}}]",
]


@dataclass(frozen=True)
class At:
    """Sends a signal to one rank (None: to each), from within, at its ``call``-th call (from 1) of a function."""

    target: str  # module:attribute
    call: int
    number: int
    rank: int | None

    @contextlib.contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        if self.rank not in (None, rank):
            yield
            return
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        real, calls = getattr(owner, name), 0

        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                os.kill(os.getpid(), self.number)
            return real(*arguments, **options)

        with mock.patch.object(owner, name, counting):
            yield


def _others_leave(start: Start, gone: int | None) -> None:
    """Wait until every rank but ``gone`` has left by itself, as a launcher does before it ends the rest."""
    left = lambda: not start.alive() or set(start.codes) >= {0, 1} - {gone}  # noqa: E731
    try:
        wait_until(left, f"the others leave rank {gone}", processes=start.processes)
    except Stuck as stuck:
        raise AssertionError(f"{stuck}: {start.text()}") from None


def _killed(at: At, words: tuple[str, ...] = ()):
    def plant(bench: Bench) -> Seen:
        start = bench.start(at, words=words)
        start.wait()
        expected = {r: -9 if at.rank in (None, r) else EXIT_HANG for r in (0, 1)}
        assert start.codes == expected, start.text()
        message = SILENT if at.rank is None else told(start)
        if at.rank is not None:
            assert "lost another rank" in message
            assert (bench.folder / "log" / f"failure-rank{1 - at.rank}.txt").exists()
        seen = bench.goes_on(message, by_rank(start), world_size=2, words=words)
        # with rank 0 died the holder of the lock, which the next start names
        left = bench.plain(bench.warning("lock_taken_over")) if at.rank != 1 else ""
        return replace(seen, message=left) if at.rank is None else seen

    return plant


for _what, _at, _words in (
    ("SIGKILL of rank 0", At(STEP, 6, signal.SIGKILL, 0), ()),
    ("SIGKILL of rank 1 (a node is lost, out of memory)", At(STEP, 6, signal.SIGKILL, 1), ()),
    ("SIGKILL of all ranks (power cut)", At(STEP, 6, signal.SIGKILL, None), ()),
    ("SIGKILL of rank 0 while a checkpoint is written", At(SAVE, 2, signal.SIGKILL, 0), ()),
    ("SIGKILL of rank 1 while a checkpoint is written", At(SAVE, 2, signal.SIGKILL, 1), ()),
    ("SIGKILL of rank 1 while evaluating", At(EVALUATE, 2, signal.SIGKILL, 1), tuple(VALIDATING)),
):
    fault(_what, slow=True)(_killed(_at, _words))


@fault("SIGSTOP of a rank (a hang)", slow=True)
def _stopped(bench: Bench) -> Seen:
    words = ["parallel.timeout_seconds=20"]
    start = bench.start(At(STEP, 6, signal.SIGSTOP, 1), words=words)
    _others_leave(start, 1)
    start.signal(None)
    start.wait()
    assert start.codes[0] == EXIT_HANG, start.text()
    written = {path.name for path in (bench.folder / "log").glob("*-rank0.txt")}
    assert written & {"stacks-rank0.txt", "failure-rank0.txt"}
    return bench.goes_on(told(start), f"rank 0: {start.codes[0]}, rank 1: stopped", world_size=2, words=words)


def _asked(number: int, rank: int):
    def plant(bench: Bench) -> Seen:
        start = bench.start(At(STEP, 4, number, rank))
        assert set(start.wait().values()) == {EXIT_REQUEUE}, start.text()
        end = bench.events("run_end")[-1]
        assert end["reason"] == "stopped"
        assert bench.newest.name == f"step_{end['step']:08d}"
        return bench.goes_on(f"run_end: stopped at step {end['step']}", by_rank(start), world_size=2, most=0)

    return plant


fault("SIGTERM to one rank", slow=True)(_asked(signal.SIGTERM, 0))
fault("SIGUSR1 to one rank")(_asked(signal.SIGUSR1, 1))


@fault("a second SIGTERM, after three seconds", slow=True)
def _insisted(bench: Bench) -> Seen:
    start = bench.start(At(STEP, 6, signal.SIGSTOP, 1))  # so that the step does not end
    while not bench.events("train") or bench.events("train")[-1]["step"] < 5:
        assert start.alive(), start.text()
        time.sleep(0.01)
    start.signal(0, signal.SIGTERM)
    time.sleep(3.5)
    assert start.alive()
    assert 0 not in start.codes
    start.signal(0, signal.SIGTERM)
    _others_leave(start, 1)
    start.signal(None)
    start.wait()
    assert start.codes[0] == EXIT_SECOND_SIGNAL
    return bench.goes_on(SILENT, f"rank 0: {start.codes[0]}, rank 1: stopped", world_size=2)


@dataclass(frozen=True)
class SlowEvaluation:
    """Lets one rank wait before each evaluated batch, in runs that take ``limit`` seconds without progress for a hang."""

    rank: int
    seconds: tuple[float, ...]  # before the first, second, … batch; none before later ones
    limit: float

    @contextlib.contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        from distributed_at.evaluation.row_maker import RowMaker

        real, left = RowMaker.rows, list(self.seconds) if rank == self.rank else []

        def waiting(work: RowMaker, ids: Any) -> Any:
            if left:
                time.sleep(left.pop(0))
            return real(work, ids)

        limits = {"setup": 3600.0, "step": 3600.0, "checkpoint": 3600.0, "evaluation": self.limit}
        with (
            mock.patch.object(RowMaker, "rows", waiting),
            mock.patch("distributed_at.engine.run.section_timeouts", return_value=limits),
        ):
            yield


@fault("a hang of one rank while evaluating", slow=True)
def _hung_evaluation(bench: Bench) -> Seen:
    start = bench.start(SlowEvaluation(rank=1, seconds=(0.0, 3600.0), limit=12.0), words=VALIDATING)
    _others_leave(start, 1)
    start.signal(None)
    start.wait()
    assert start.codes[0] == EXIT_HANG, start.text()
    stacks = (bench.folder / "log" / "stacks-rank1.txt").read_text()
    assert "section 'evaluation'" in stacks
    assert "in waiting" in stacks  # where it hangs
    return bench.goes_on(told(start), EXIT_HANG, world_size=2, words=VALIDATING)


@dataclass(frozen=True)
class Slow:
    """Lets one rank sleep in each step before its work, as a throttled GPU or a busy host does."""

    rank: int
    seconds: float

    @contextlib.contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        from distributed_at.engine.microbatches import MicroBatches

        real = MicroBatches.next_step

        def sleeping(batches: MicroBatches) -> Any:
            if rank == self.rank:
                time.sleep(self.seconds)
            return real(batches)

        with mock.patch.object(MicroBatches, "next_step", sleeping):
            yield


@fault("a slow rank")
def _slow(bench: Bench) -> Seen:
    start = bench.start(Slow(rank=1, seconds=0.3), quiet=False)
    assert set(start.wait().values()) == {EXIT_OK}, start.text()
    # the last word: a first step, whose parts are set up, may be slow anywhere
    message = [row["message"] for row in bench.events("warning") if row["code"] == "slow_ranks"][-1]
    assert "rank 1 on " in message
    assert "rank 0 on " not in message
    assert f"WARNING slow_ranks: {message}" in start.text()  # on the console too
    return bench.ended(f"WARNING slow_ranks: {message}", by_rank(start), world_size=2, most=0)
