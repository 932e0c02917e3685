"""Waits of tests. They last as long as something moves, however busy the machine is, and give up where nothing does.

What moves is what the test names, and the processor time of processes: one that hangs uses none, and one that gets little
of a busy machine still gets some.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

STILL = 300.0  # seconds without a sign that count as a hang
LONGEST = 3600.0  # seconds; for what moves in circles


class Stuck(AssertionError):
    """Nothing moved for so long that nothing will."""


def processor_seconds(processes: Iterable[int]) -> int:
    """Whole seconds of processor time that live processes and all their descendants have used; 0 without /proc."""
    ticks, left = 0, list(processes)
    while left:
        folder = Path("/proc", str(left.pop()))
        try:
            ticks += sum(int(word) for word in (folder / "stat").read_text().rpartition(")")[2].split()[11:15])
            for task in (folder / "task").iterdir():
                left += [int(word) for word in (task / "children").read_text().split()]
        except (OSError, ValueError):
            continue
    return ticks // os.sysconf("SC_CLK_TCK")


def wait_until(
    done: Callable[[], object],
    what: str,
    *,
    processes: Sequence[int] = (),
    moved: Callable[[], object] = lambda: None,
    still: float = STILL,
    pause: float = 0.01,
) -> None:
    """Return once ``done()`` is true.

    Raises:
        Stuck: where neither ``moved()`` nor the processor time of ``processes`` has changed for ``still`` seconds.
    """
    # time counts only while this process itself runs: one that was suspended has learnt nothing of the others
    waited = since = looked = 0.0
    before = time.monotonic()
    last: object = None
    while not done():
        now = time.monotonic()
        waited += min(now - before, pause + 1.0)
        before = now
        if waited - looked >= min(1.0, still / 4) or last is None:
            looked = waited
            if (sign := (moved(), processor_seconds(processes))) != last:
                last, since = sign, waited
        if waited - since > still or waited > LONGEST:
            raise Stuck(f"{what}: not within {waited:.0f} s, and the last sign of life was {waited - since:.0f} s ago")
        time.sleep(pause)


def end_of(process: subprocess.Popen[Any], what: str = "the command has ended") -> int:
    """Wait for a process to end and return its exit code; one that does nothing any more is killed, with its group."""
    try:
        wait_until(lambda: process.poll() is not None, what, processes=[process.pid])
    except Stuck:
        own_group = os.getpgid(process.pid) == process.pid
        (os.killpg if own_group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return int(process.returncode)


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run(command, capture_output=True, text=True)``, with patience in place of a timeout."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True, start_new_session=True, **options)
        try:
            code = end_of(process)
        except Stuck as stuck:
            err.seek(0)
            raise Stuck(f"{stuck}\n{err.read()[-4000:]}") from None
        except BaseException:
            process.kill()
            raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(list(command), code, out.read(), err.read())
