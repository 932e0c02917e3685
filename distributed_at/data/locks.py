"""A lock between the processes of a machine, so that one prepares a folder while the others wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no advisory locks on this system: every process prepares its own copy, atomically
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """Hold an advisory lock on ``path`` (created; it stays, empty). File systems without locks are passed through.

    The system drops the lock with the process, so a killed holder never blocks the others.
    """
    if fcntl is None:
        yield
        return
    with open(path, "a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
