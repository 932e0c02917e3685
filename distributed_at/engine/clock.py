"""Where a step's time goes: data, attack, training, communication, checkpoint, and the rest.

On a GPU the marks are CUDA events, resolved only when a row is logged, so that measuring never waits for the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

SECTIONS = ("data", "attack", "train", "communication", "checkpoint", "other")


class StepClock:
    """Adds up seconds per section between two calls of ``collect``; sections do not nest."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = dict.fromkeys(SECTIONS, 0.0)
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._wall_start = time.perf_counter()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Count the time inside the block as ``name``."""
        if name not in self._seconds:
            raise ValueError(f"section {name!r} is none of {SECTIONS}")
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            try:
                yield
            finally:
                end.record()
                self._marks.append((name, start, end))
            return
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside the block (an evaluation) out of every figure."""
        if self._cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self._cuda:
                torch.cuda.synchronize()
            self._wall_start += time.perf_counter() - begin

    def collect(self) -> tuple[dict[str, float], float]:
        """Return (seconds per section, wall seconds) since the last call; 'other' is what no section claimed."""
        if self._cuda and self._marks:
            self._marks[-1][2].synchronize()
            for name, start, end in self._marks:
                self._seconds[name] += start.elapsed_time(end) / 1000.0
            self._marks.clear()
        now = time.perf_counter()
        wall, self._wall_start = now - self._wall_start, now
        seconds = self._seconds
        seconds["other"] = max(0.0, wall - sum(v for k, v in seconds.items() if k != "other"))
        self._seconds = dict.fromkeys(SECTIONS, 0.0)
        return seconds, wall
