"""Disks that are full, read-only, slow or broken: training goes on while it can, and the last good checkpoint stays.

Errors that no ordinary file system gives on demand are raised by the system calls that saving makes (``os.fsync``,
``os.rename``), on the run's checkpoints alone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest import mock

from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.errors import EXIT_CONFIG, EXIT_NO_CHECKPOINT, EXIT_OK, EXIT_REQUEUE
from tests.faults.faults import SILENT, Bench, Seen, fault, log_lines


def _path(argument: Any) -> str:
    return os.readlink(f"/proc/self/fd/{argument}") if isinstance(argument, int) else str(argument)


@contextlib.contextmanager
def refusing(call: str, number: int, pattern: str, *, times: float = float("inf")) -> Iterator[list[str]]:
    """Let ``os.<call>`` fail with error ``number`` on paths like ``pattern``, the first ``times`` times."""
    real, refused = getattr(os, call), []

    def failing(first: Any, *rest: Any, **options: Any) -> Any:
        if len(refused) < times and fnmatch(_path(first), pattern):
            refused.append(_path(first))
            raise OSError(number, os.strerror(number), _path(first))
        return real(first, *rest, **options)

    with mock.patch.object(os, call, failing):
        yield refused


@contextlib.contextmanager
def quick_retries(seconds: float = 0.0) -> Iterator[None]:
    """Let a run wait ``seconds`` after a failed save instead of half a minute, and not long at its end."""
    manager = functools.partial(CheckpointManager, retry_seconds=seconds)
    with (
        mock.patch("distributed_at.engine.run.CheckpointManager", manager),
        mock.patch("distributed_at.engine.saving.PATIENCE", (0.01,)),
    ):
        yield


def _passing(call: str, number: int, pattern: str) -> Callable[[Bench], Seen]:
    """A fault of the disk that passes: the save is repeated after its wait, the run ends as if nothing had been."""

    def plant(bench: Bench) -> Seen:
        with quick_retries(), refusing(call, number, pattern, times=1) as refused:
            code, told = bench.train()
        assert code == EXIT_OK, told
        assert len(refused) == 1
        failed = next(row for row in bench.events("warning") if row["code"] == "checkpoint_failed")
        assert os.strerror(number) in failed["message"]
        written = [row["step"] for row in bench.events("checkpoint")]
        assert failed["step"] == 2
        assert written[0] == 3, "not tried again before the next checkpoint was due"
        return bench.ended(bench.warning("checkpoint_failed"), code)

    return plant


for _what, _arguments in {
    "quota exceeded while a shard is written": ("fsync", errno.EDQUOT, "*.distcp"),
    "input/output error while a shard is synced": ("fsync", errno.EIO, "*.distcp"),
    "input/output error in the manifest": ("fsync", errno.EIO, "*manifest.json*"),
    "stale file handle when a checkpoint gets its name": ("rename", errno.ESTALE, "*/.tmp-step_????????"),
    "no space for the folder of a checkpoint": ("mkdir", errno.ENOSPC, "*/.tmp-step_????????"),
}.items():
    fault(_what)(_passing(*_arguments))


def _to_the_end(call: str, number: int, pattern: str) -> Callable[[Bench], Seen]:
    """A fault of the disk that stays: training goes on, the end is not passed over, the last good checkpoint stays."""

    def plant(bench: Bench) -> Seen:
        assert bench.train(stop_at=4)[0] == EXIT_REQUEUE
        good = bench.newest.name
        with quick_retries(), refusing(call, number, pattern) as refused:
            code, message = bench.train()
        assert code == EXIT_NO_CHECKPOINT
        assert "last checkpoint could not be written" in message
        assert os.strerror(number) in message
        assert len(refused) >= 4  # after each wait, and with patience at the end
        assert bench.newest.name == good
        assert not list(bench.checkpoints.glob(".tmp-*"))
        return bench.goes_on(message, code, most=5)

    return plant


fault("input/output errors until the end of the run")(_to_the_end("fsync", errno.EIO, "*.distcp"))
fault("file system read-only from the middle of the run on")(_to_the_end("mkdir", errno.EROFS, "*/.tmp-step_????????"))


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "1m") -> Iterator[Path]:
    """Mount a small file system in memory at ``folder``."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(disk: Path, room: int) -> Path:
    """Fill the disk but for ``room`` bytes; return the file that does it."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler = disk / "filler"
    filler.write_bytes(b"x" * (free - room))
    return filler


@fault("disk full", root=True)
def _full(bench: Bench) -> Seen:
    with small_disk(bench.folder.parent / "disk") as disk:
        inner = Bench(disk / "run", bench.undisturbed)
        assert inner.train(stop_at=3)[0] == EXIT_REQUEUE
        filler = fill(disk, 24 * 1024)  # room for rows, not for a checkpoint
        with quick_retries():
            code, message = inner.train()
        assert code == EXIT_NO_CHECKPOINT
        assert "No space left" in inner.warning("checkpoint_failed")
        assert inner.newest.name == "step_00000003"
        assert not list(inner.checkpoints.glob(".tmp-*"))
        filler.unlink()
        return inner.goes_on(message, code, most=6)


@fault("disk full at the start", root=True)
def _full_at_the_start(bench: Bench) -> Seen:
    with small_disk(bench.folder.parent / "disk") as disk:
        filler = fill(disk, 0)
        inner = Bench(disk / "run", bench.undisturbed)
        code, message = inner.train()
        assert code == EXIT_CONFIG
        filler.unlink()
        return inner.goes_on(message, code, most=0)


@fault("file system read-only at the start", root=True)
def _read_only_at_the_start(bench: Bench) -> Seen:
    with small_disk(bench.folder.parent / "disk") as disk:
        inner = Bench(disk / "run", bench.undisturbed)
        assert inner.train(stop_at=3)[0] == EXIT_REQUEUE
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code, message = inner.train()
        assert code == EXIT_CONFIG
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        return inner.goes_on(message, code, most=0)


@fault("slow metadata server")
def _slow_metadata(bench: Bench) -> Seen:
    slept = []

    def slow(real: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*arguments: Any, **options: Any) -> Any:
            if "checkpoints" in _path(arguments[0]):
                slept.append(0.02)
                time.sleep(slept[-1])
            return real(*arguments, **options)

        return waiting

    with contextlib.ExitStack() as stack:
        for call in ("mkdir", "rename", "replace", "fsync", "listdir", "unlink", "rmdir"):
            stack.enter_context(mock.patch.object(os, call, slow(getattr(os, call))))
        code, told = bench.train()
    assert code == EXIT_OK, told
    assert len(slept) > 20
    assert not [row for row in bench.events("warning") if "checkpoint" in row["code"]]
    return bench.ended(SILENT, code)


@fault("rows of events.jsonl refused for a while")
def _rows_refused(bench: Bench) -> Seen:
    real, refused = os.write, []

    def failing(descriptor: int, data: bytes) -> int:
        if "events.jsonl" in _path(descriptor) and b'"train"' in data and len(refused) < 4:
            refused.append(data)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(descriptor, data)

    with mock.patch.object(os, "write", failing), log_lines() as lines:
        code, told = bench.train()
    assert code == EXIT_OK, told
    assert refused
    return bench.ended(lines[0], code)
