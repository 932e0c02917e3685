"""What is refused before anything is lost: a folder in use, another recipe, ranks that do not divide the batch."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any
from unittest import mock

from distributed_at.cli import main
from distributed_at.engine.runs.lock import LOCK, RunLock, this_process
from distributed_at.errors import EXIT_CONFIG, EXIT_LOCKED, EXIT_OK, EXIT_REQUEUE
from tests.distributed.test_elastic import LOSS_TOLERANCE
from tests.faults.faults import SAVING, SILENT, Bench, Seen, by_rank, fault, told
from tests.faults.processes import STEP, At
from tests.training_kit import RECIPE, TINY, training_rows


def command(bench: Bench, *words: str) -> tuple[int, str]:
    """Give the whole command line in this process; return its exit code and what it told."""
    told = io.StringIO()
    line = ["train", str(RECIPE), *TINY, *SAVING, "--run-folder", str(bench.folder), *words]
    with contextlib.redirect_stderr(told):
        code = main(line)
    return code, told.getvalue()


@fault("a second job on the folder")
def _in_use(bench: Bench) -> Seen:
    assert bench.train(stop_at=4)[0] == EXIT_REQUEUE
    with RunLock(bench.folder):
        start = bench.start(contextlib.nullcontext)
        assert set(start.wait().values()) == {EXIT_LOCKED}, start.text()
    return bench.goes_on(told(start), by_rank(start), most=0)


def _plant_lock(bench: Bench, **fields: Any) -> None:
    (bench.folder / LOCK).write_text(json.dumps(asdict(replace(this_process(), **fields))))


@fault("the lock of a dead process")
def _stale(bench: Bench) -> Seen:
    assert bench.train(stop_at=4)[0] == EXIT_REQUEUE
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    _plant_lock(bench, pid=gone.pid, started="1", token="gone")
    code, message = bench.train()
    assert code == EXIT_OK, message
    return bench.ended(bench.warning("lock_taken_over"), code, most=0)


@fault("another start takes the folder over while training")
def _taken_over(bench: Bench) -> Seen:
    from distributed_at.engine.trainer import Trainer

    real = Trainer._step

    def losing(self: Trainer, batches: Any, step: int) -> tuple[bool, bool]:
        if step == 5:
            _plant_lock(bench, host="elsewhere", token="other")
        return real(self, batches, step)

    with mock.patch.object(Trainer, "_step", losing):
        code, message = bench.train()
    assert code == EXIT_LOCKED
    assert bench.newest.name == "step_00000004"  # it did not write beside the other
    (bench.folder / LOCK).unlink()
    return bench.goes_on(message, code)


def _refused(words: Sequence[str]):
    def plant(bench: Bench) -> Seen:
        assert bench.train(stop_at=4)[0] == EXIT_REQUEUE
        before = sorted(path.name for path in bench.folder.rglob("*"))
        code, message = command(bench, *words)
        assert code == EXIT_CONFIG
        assert sorted(path.name for path in bench.folder.rglob("*")) == before
        return bench.goes_on(message, code, most=0)

    return plant


fault("the recipe was changed")(_refused(["optimizer.lr=0.3", "--workers", "1"]))
fault("a number of workers that does not divide the batch")(_refused(["--workers", "5"]))


@fault("fewer workers than before")
def _fewer(bench: Bench) -> Seen:
    start = bench.start(At(STEP, 5, signal.SIGUSR1, 1))
    assert set(start.wait().values()) == {EXIT_REQUEUE}, start.text()
    code, message = bench.train()
    assert code == EXIT_OK, message
    whole = training_rows(bench.undisturbed.get(2))
    own = training_rows(bench.folder)
    assert [row["step"] for row in own] == [row["step"] for row in whole]
    largest = max(abs(a["loss"] - b["loss"]) for a, b in zip(own, whole, strict=True))
    assert largest < LOSS_TOLERANCE
    return Seen(SILENT, str(code), 0, f"losses of all steps within {LOSS_TOLERANCE:g} of the undisturbed run")
