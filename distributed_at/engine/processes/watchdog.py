"""Ends a hang within a set time with the stacks of every thread, and names the ranks that slow the others down.

It cannot tell why a rank hangs; the stacks of all ranks, read side by side, can.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_at.errors import EXIT_HANG

DEFAULT_TIMEOUTS = {"setup": 1800.0, "step": 900.0, "checkpoint": 1800.0, "evaluation": 3600.0}  # seconds
_GRACE = 15.0  # seconds between the watchdog's own exit and the one that needs no Python


def section_timeouts(seconds: float) -> dict[str, float]:
    """Timeouts of all sections from ``parallel.timeout_seconds``: set-up compiles, an evaluation is many steps."""
    return {"setup": max(seconds, 600.0), "step": seconds, "checkpoint": seconds, "evaluation": 4 * seconds}


class Watchdog:
    """Watches named sections of the main thread; a section that outlives its timeout ends the process.

    Stacks of all threads go to ``folder/stacks-rank<r>.txt``; then the process leaves with exit code 6 and the launcher
    ends the other ranks. Where a native call holds the interpreter, faulthandler's own thread does it (exit code 1).
    ``timeouts``: section -> seconds; 'step' serves for sections without one of their own.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        rank: int = 0,
        timeouts: Mapping[str, float] | None = None,
        on_hang: Callable[[str], None] | None = None,
    ) -> None:
        self.path = Path(folder) / f"stacks-rank{rank}.txt"
        self._rank = rank
        self._timeouts = {**DEFAULT_TIMEOUTS, **(timeouts or {})}
        self._on_hang = on_hang
        self._armed: list[tuple[str, float]] = []  # (section, timeout), innermost last
        self._deadline = float("inf")
        self._armed_at = 0.0
        self._changed = threading.Condition()
        self._closed = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - faulthandler needs it open all along
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Watch a block. Sections nest: the outer one's time starts anew when the inner one ends."""
        timeout = self._timeouts.get(name, self._timeouts["step"])
        self._armed.append((name, timeout))
        self._arm()
        try:
            yield
        finally:
            self._armed.pop()
            self._arm()

    def beat(self) -> None:
        """Start the current section's time anew: there is progress. Cheap enough to call before every forward pass."""
        if self._armed and time.monotonic() - self._armed_at >= min(1.0, 0.1 * self._armed[-1][1]):
            self._arm()

    def close(self) -> None:
        """Stop watching."""
        faulthandler.cancel_dump_traceback_later()
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5.0)
        self._file.close()
        with contextlib.suppress(OSError):
            if self.path.stat().st_size == 0:
                self.path.unlink()

    def _arm(self) -> None:
        with self._changed:
            timeout = self._armed[-1][1] if self._armed else None
            self._armed_at = time.monotonic()
            self._deadline = self._armed_at + timeout if timeout is not None else float("inf")
            self._changed.notify()
        if timeout is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(timeout + _GRACE, exit=True, file=self._file)

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                left = self._deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(timeout=None if left == float("inf") else left)
            else:
                return
        name, timeout = self._armed[-1] if self._armed else ("?", 0.0)
        told = f"rank {self._rank} on {socket.gethostname()}: no progress in section '{name}' for {timeout:g} s"
        with contextlib.suppress(Exception):
            self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {told}\n")
            self._file.flush()
            faulthandler.dump_traceback(file=self._file, all_threads=True)
            os.fsync(self._file.fileno())
            print(f"{told}; stacks of all threads are in {self.path}", file=sys.stderr, flush=True)
            if self._on_hang is not None:
                self._on_hang(told)
        os._exit(EXIT_HANG)


@dataclass(frozen=True)
class Straggler:
    """A rank whose own work takes longer than the others'."""

    rank: int
    host: str
    seconds: float  # median per step
    ratio: float  # to the median over ranks


class StepTimes:
    """Recent seconds per step of this rank's *own* work: record them before the step's first collective.

    The whole step takes equally long on all ranks, because they wait for the slowest; so the whole step says nothing.
    """

    def __init__(self, window: int = 50) -> None:
        self._seconds: deque[float] = deque(maxlen=window)

    def record(self, seconds: float) -> None:
        """Add one step's seconds."""
        self._seconds.append(seconds)

    def stragglers(self, *, ratio: float = 1.5, least: float = 0.0, group: Any = None) -> list[Straggler]:
        """Gather every rank's median and name those beyond ``ratio`` times the median rank; same answer on all ranks.

        ``least``: seconds a step by which a rank must be slower to be named.
        """
        from distributed_at.exchange import gather_objects

        own = (socket.gethostname(), statistics.median(self._seconds) if self._seconds else 0.0)
        found = gather_objects(own, group)
        typical = statistics.median_low([seconds for _, seconds in found])
        if typical <= 0:
            return []
        slow = [
            Straggler(r, host, s, s / typical)
            for r, (host, s) in enumerate(found)
            if s > ratio * typical and s - typical >= least
        ]
        return sorted(slow, key=lambda straggler: -straggler.ratio)
