"""Stop signals (time limit, preemption, cancel, a closed terminal): heard at once by a thread, acted on by all ranks at one step boundary.

Python's own handlers do not run while the main thread waits in a collective; a thread in ``sigwait`` hears at once.
Import and call ``prepare_process`` before torch, because threads inherit the mask of blocked signals: this module
imports torch only where ranks talk.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from distributed_at.engine.processes.leaving import leave

SET_UP_SECONDS = 5.0  # that a set-up may still take after the first signal, to end as a run that has begun
EXIT_SECOND_SIGNAL = 128 + signal.SIGTERM  # 143: left at once, nothing saved
_PR_SET_PDEATHSIG = 1


def stop_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask to stop: SIGHUP too, unless it is ignored, as ``nohup`` has it."""
    asked = (signal.SIGTERM, signal.SIGUSR1)
    return asked if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (*asked, signal.SIGHUP)


def leave_terminal() -> None:
    """Turn stdout and stderr away from a terminal that is gone: what is printed there would raise before a save."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)


def prepare_process() -> None:
    """Call first in a worker, before torch is imported: block the stop signals and die with the launcher."""
    block_signals()
    die_with_parent()


def block_signals() -> None:
    """Keep the stop signals from killing this process; a ``StopListener`` then takes them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())


def unblock_signals() -> None:
    """For a child between fork and exec (``preexec_fn``): it must stay terminable."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())


def die_with_parent(sent: signal.Signals = signal.SIGKILL) -> bool:
    """Ask the kernel to send ``sent`` when the parent dies, so that a killed launcher leaves no worker that goes on writing.

    Returns whether the kernel agreed (Linux alone). A parent that died before the call is noticed too.
    """
    if not sys.platform.startswith("linux"):
        return False
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(sent), 0, 0, 0) == 0:
            if os.getppid() != parent:
                os.kill(os.getpid(), sent)
            return True
    return False


class StopListener:
    """Waits for stop signals in a thread of its own.

    ``on_first(name)`` runs once in that thread (keep it short: a line of log). A SIGTERM ``grace_seconds`` or more after
    the first signal means that somebody insists: the process leaves at once with ``EXIT_SECOND_SIGNAL``. Repeats
    within the grace are the same request, because schedulers and launchers both forward it; the other two never insist.

    ``leave_set_up_with``: exit code of a process that is still being set up some seconds after the first signal, since
    ranks that wait for each other reach no step; until ``set_up_is_over``.
    """

    def __init__(
        self,
        *,
        on_first: Callable[[str], None] | None = None,
        grace_seconds: float = 3.0,
        leave_set_up_with: int | None = None,
    ) -> None:
        self._on_first = on_first
        self._set_up_code = leave_set_up_with
        self._grace_seconds = grace_seconds
        self._first: signal.Signals | None = None
        self._first_time = 0.0
        self._thread: threading.Thread | None = None
        self._closing = False

    def start(self) -> StopListener:
        """Begin to listen. Signals sent since ``block_signals`` are not lost. Call it in the main thread."""
        block_signals()
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def set_up_is_over(self) -> None:
        """From here on the ranks stop together, at a step's end."""
        self._set_up_code = None

    def _leave_set_up(self) -> None:
        if self._set_up_code is not None and not self._closing:
            leave(self._set_up_code, "distributed-at: stopped while the run was being set up; nothing is lost")

    def close(self) -> None:
        """Stop listening; the signals stay blocked, so that none can kill a process that is saving its last results."""
        self._closing = True
        if self._thread is not None and self._thread.is_alive():
            signal.pthread_kill(self._thread.ident, signal.SIGUSR1)  # type: ignore[arg-type]
            self._thread.join(timeout=5.0)

    @property
    def requested(self) -> str | None:
        """Name of the first stop signal that this rank received, or None."""
        return self._first.name if self._first is not None else None

    def stop_requested(self) -> bool:
        """Whether this rank was asked to stop; the ranks must agree before any of them acts (``agree_max``)."""
        return self._first is not None

    def _listen(self) -> None:
        heard = stop_signals()
        while True:
            received = signal.Signals(signal.sigwait(heard))
            if self._closing:
                return
            if received == signal.SIGHUP:
                leave_terminal()
            now = time.monotonic()
            if self._first is None:
                self._first, self._first_time = received, now
                if self._on_first is not None:
                    with contextlib.suppress(Exception):
                        self._on_first(received.name)
                if self._set_up_code is not None:
                    timer = threading.Timer(SET_UP_SECONDS, self._leave_set_up)
                    timer.daemon = True
                    timer.start()
            elif received == signal.SIGTERM and now - self._first_time >= self._grace_seconds:
                os._exit(EXIT_SECOND_SIGNAL)


_listener: StopListener | None = None


def start_listening(
    *,
    on_first: Callable[[str], None] | None = None,
    grace_seconds: float = 3.0,
    leave_set_up_with: int | None = None,
) -> StopListener:
    """Start this process's one listener, or return it where it runs already."""
    global _listener
    if _listener is None:
        _listener = StopListener(
            on_first=on_first, grace_seconds=grace_seconds, leave_set_up_with=leave_set_up_with
        ).start()
    return _listener


def stop_requested() -> bool:
    """Whether this process's listener heard a stop signal."""
    return _listener is not None and _listener.stop_requested()


def agree_max(flags: Sequence[int], *, group: Any = None) -> list[int]:
    """Element-wise maximum over all ranks of small integers: stop, save now, how bad the step was, all in one exchange.

    ``group``: a gloo group, so that no flag waits for the GPU. Without a process group, the flags themselves.
    """
    from distributed_at.exchange import largest

    return largest(flags, group)
