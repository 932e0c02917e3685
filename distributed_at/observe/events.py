"""The run's record: ``events.jsonl``, one JSON object a line, append-only; console, wandb and report are views of it.

Writing never raises into training: a row that cannot be written waits and is tried again with the next one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from distributed_at.observe.encoding import from_json, to_json
from distributed_at.observe.secrets import redact, secret_values

EVENTS_FILE = "events.jsonl"
KINDS = ("run_start", "restart", "train", "evaluation", "verdict", "checkpoint", "epoch", "warning", "run_end")
LONGEST_BACKLOG = 10_000  # rows kept in memory while the disk refuses them; then the oldest go
VIEW_FAILURES = 10  # consecutive; after that many a view is no longer called
STATE_KINDS = ("train", "evaluation", "checkpoint", "epoch")  # what a restart at step s undoes past s
HISTORY_KINDS = ("run_start", "restart", "run_end")  # one each time the command ran: never replaced

logger = logging.getLogger("distributed_at.observe")


class View(Protocol):
    """Something that shows events: it gets every row after the row was given to the file."""

    def on_event(self, row: Mapping[str, Any]) -> None:
        """Show one row."""

    def close(self) -> None:
        """Show the end."""


class EventLog:
    """Appends rows to ``<run_folder>/events.jsonl`` and hands them to the views. Safe to call from several threads.

    Args:
        run_folder: the run's folder; made if absent.
        restart: how often this run was started before (``next_restart``); written into every row.
        views: shown every row; one that raises is warned about once and dropped after ten failures in a row.
        enabled: False on ranks other than 0: every call then does nothing.
    """

    def __init__(
        self, run_folder: Path | str, *, restart: int = 0, views: Iterable[View] = (), enabled: bool = True
    ) -> None:
        self.path = Path(run_folder) / EVENTS_FILE
        self.restart = restart
        self._views = list(views) if enabled else []
        self._enabled = enabled
        self._lock = threading.RLock()
        self._descriptor: int | None = None
        self._backlog: deque[bytes] = deque()
        self._lost = 0
        self._failed = False
        self._torn = False
        self._view_failures: dict[int, int] = {}

    def write(self, event: str, *, step: int, epoch: float, **fields: Any) -> dict[str, Any]:
        """Append one row and show it; returns the row as written. Never raises.

        Args:
            event: one of ``KINDS`` (others are kept too).
            step: optimiser steps done.
            epoch: epochs done, with a fraction.
            **fields: anything ``to_json`` takes; names of the five fixed fields are overruled by these.
        """
        if not self._enabled:
            return {}
        try:
            fixed = {"event": event, "step": step, "epoch": epoch, "time": time.time(), "restart": self.restart}
            row = redact(to_json({**fixed, **{k: v for k, v in fields.items() if k not in fixed}}), secret_values())
            line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"
        except Exception as error:  # a value that refuses to be read must not end a run
            logger.warning("an event %r could not be encoded: %s", event, error)
            return {}
        with self._lock:
            self._append(line)
            self._show(from_json(row))
        return row

    def sync(self) -> bool:
        """Force the file to disk (``fsync``), as at checkpoints; True where that succeeded. Never raises."""
        with self._lock:
            try:
                if self._flush_backlog() and self._descriptor is not None:
                    os.fsync(self._descriptor)
                    return True
            except OSError as error:
                self._warn(error)
        return False

    def close(self) -> None:
        """Write what waits, force it to disk, close the views. May be called twice. Never raises."""
        if not self._enabled:
            return
        with self._lock:
            self.sync()
            for view in self._views:
                try:
                    view.close()
                except Exception as error:
                    logger.warning("%s did not close: %s", type(view).__name__, error)
            self._views = []
            self._shut()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        self._backlog.append(line)
        while len(self._backlog) > LONGEST_BACKLOG:
            self._backlog.popleft()
            self._lost += 1
        self._flush_backlog()

    def _flush_backlog(self) -> bool:
        """Write the waiting rows, each with one ``write`` call; False where the disk refused."""
        try:
            self._open()
            while self._backlog:
                self._write_line(self._backlog[0])
                self._backlog.popleft()
        except Exception as error:
            self._warn(error)
            self._shut()  # the next try opens anew: the folder may have been remounted
            return False
        if self._failed:
            self._failed = False
            logger.warning("%s can be written again (%d rows were lost)", self.path, self._lost)
        return True

    def _open(self) -> None:
        if self._descriptor is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._descriptor).st_size
        # A run killed in the middle of a write leaves half a line; the next row must not be glued to it.
        self._torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"

    def _write_line(self, line: bytes) -> None:
        assert self._descriptor is not None
        data = b"\n" + line if self._torn else line
        written = os.write(self._descriptor, data)
        self._torn = written != len(data)
        if self._torn:
            raise OSError(f"only {written} of {len(data)} bytes of a row were written")

    def _shut(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def _warn(self, error: Exception) -> None:
        if not self._failed:
            logger.warning("%s cannot be written (%s); rows wait in memory and are tried again", self.path, error)
        self._failed = True

    def _show(self, row: Mapping[str, Any]) -> None:
        for view in list(self._views):
            try:
                view.on_event(row)
                self._view_failures[id(view)] = 0
            except Exception as error:
                failures = self._view_failures[id(view)] = self._view_failures.get(id(view), 0) + 1
                if failures == 1:
                    logger.warning("%s could not show an event: %s", type(view).__name__, error)
                if failures >= VIEW_FAILURES:
                    logger.warning("%s is switched off", type(view).__name__)
                    self._views.remove(view)


def _lines(run_folder: Path | str) -> Iterator[dict[str, Any]]:
    """Yield every whole row of the file in order of writing; half-written lines are passed over."""
    try:
        data = (Path(run_folder) / EVENTS_FILE).read_bytes()
    except FileNotFoundError:
        return
    for line in data.split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # empty, or torn: a proper prefix of an object is never valid JSON
            continue
        if isinstance(row, dict) and isinstance(row.get("event"), str):
            yield from_json(row)


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a later row must share to replace an earlier one."""
    event, step = row["event"], row.get("step")
    if event in HISTORY_KINDS:
        return event, step, row.get("restart", 0), row.get("time")
    if event == "warning":
        return event, step, row.get("code"), row.get("message")
    if event == "evaluation":  # by name: the hash covers the weights, whose last bits another machine may change
        protocol = row.get("protocol")
        name = protocol.get("name") if isinstance(protocol, Mapping) else protocol
        return event, step, row.get("split"), name, row.get("branch"), row.get("metric")
    if event == "verdict":  # those of the last evaluation of a split stand
        return event, row.get("split")
    return event, step


def deduplicate(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that stand, in order of writing.

    A later row replaces an earlier one of the same kind and step (evaluations: and of the same protocol, split and
    branch). A ``restart`` at step s undoes training rows past s that earlier starts wrote: the run goes on from s.
    """
    standing: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["event"] == "restart" and isinstance(row.get("step"), (int, float)):
            for key, old in list(standing.items()):
                place = old.get("step")
                if old["event"] in STATE_KINDS and isinstance(place, (int, float)) and place > row["step"]:
                    del standing[key]
        key = _identity(row)
        standing.pop(key, None)  # so that the row takes the place of its own writing
        standing[key] = dict(row)
    return list(standing.values())


def read_events(run_folder: Path | str, *, raw: bool = False) -> list[dict[str, Any]]:
    """Read a run's events; safe while the run is writing.

    Args:
        run_folder: folder that holds ``events.jsonl``; an absent file gives an empty list.
        raw: True returns every whole row, also those that a restart replaced.
    """
    rows = _lines(run_folder)
    return list(rows) if raw else deduplicate(rows)


def select(events: Iterable[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """Return the rows of one kind in order of step."""
    found = [row for row in events if row["event"] == kind]
    return sorted(found, key=lambda row: row.get("step") or 0)


def next_restart(run_folder: Path | str) -> int:
    """Return the restart number of the start about to be made: 0 for the first."""
    numbers = [row.get("restart", 0) for row in _lines(run_folder)]
    return max((n for n in numbers if isinstance(n, int)), default=-1) + 1
