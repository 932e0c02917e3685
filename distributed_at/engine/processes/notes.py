"""What parts of a rank have to say and cannot write themselves: rank 0 alone has the event log."""

from __future__ import annotations

from collections import deque

from distributed_at.engine.processes.world import World, gather_all

MOST = 100  # notes that wait between two rows of the log; then the oldest go


class Notes:
    """Warnings of this rank's data source, kept until the ranks next write a row together."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, str]] = deque(maxlen=MOST)

    def add(self, code: str, message: str) -> None:
        """Keep a warning; may be called from the thread that prefetches."""
        self._waiting.append((code, message))

    def collect(self, world: World) -> list[tuple[str, str]]:
        """Return all ranks' warnings since the last call, each once; all ranks call it and get the same."""
        own = [self._waiting.popleft() for _ in range(len(self._waiting))]
        return list(dict.fromkeys(note for notes in gather_all(own, world) for note in notes))
