"""Prepares batches ahead of the consumer in one background thread, in the order of the requests."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

Request = TypeVar("Request")
Item = TypeVar("Item")
_END = object()


class Prefetcher(Generic[Request, Item]):
    """Iterates over ``read(request)`` for each request, computed up to ``depth`` items ahead.

    An exception in ``requests`` or ``read`` is raised in the consumer, after the items before it. ``close`` (or the end
    of a ``with`` block) stops the thread and waits for it; a closed prefetcher yields nothing more. Depth 0 reads in the
    consumer's thread.
    """

    def __init__(self, requests: Iterable[Request], read: Callable[[Request], Item], depth: int) -> None:
        if depth < 0:
            raise ValueError(f"depth must be >= 0, got {depth}")
        self._requests = iter(requests)
        self._read = read
        self._closed = threading.Event()
        self._finished = False
        self._queue: queue.Queue[tuple[object, BaseException | None]] = queue.Queue()
        # bounds the items ahead, the one being read included
        self._room = threading.Semaphore(max(depth, 1))
        self._thread: threading.Thread | None = None
        if depth:
            self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._closed.is_set():
                    self._queue.put((_END, None))  # wakes a consumer that waits in another thread
                    return
                try:
                    request = next(self._requests)
                except StopIteration:
                    self._queue.put((_END, None))
                    return
                self._queue.put((self._read(request), None))
        except BaseException as error:  # handed over, whatever it is
            self._queue.put((_END, error))

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._finished or self._closed.is_set():
            raise StopIteration
        if self._thread is None:
            return self._read(next(self._requests))
        item, error = self._queue.get()
        if item is _END:
            self._finished = True
            self._thread.join()
            if isinstance(error, StopIteration):
                raise RuntimeError("read raised StopIteration") from error
            if error is not None:
                raise error
            raise StopIteration
        self._room.release()
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop reading ahead and wait for the thread; a read in progress is finished first. May be called twice."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._room.release()
            self._thread.join()

    def __enter__(self) -> Prefetcher[Request, Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
