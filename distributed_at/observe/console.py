"""The live console of rank 0: progress, losses, accuracies, speed and time left, drawn from events alone.

On a terminal it is one panel that renews itself; elsewhere (a job's log file) it is plain lines, one an event.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from distributed_at.cost import format_seconds, seconds_left
from distributed_at.observe.record import Measurement, parse_measurement

RECENT_ROWS = 20  # train rows that the rate for the time left is taken from
SHOWN_WARNINGS = 3


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _percent(value: Any) -> str:
    number = _number(value)
    return "–" if number is None else f"{100 * number:.1f}%"


def format_quantity(value: Any) -> str:
    """Return a loss or rate with four significant digits; ``nan`` and ``inf`` in words; ``–`` where there is none."""
    number = _number(value)
    if number is None:
        return "–"
    return f"{number:.4g}" if math.isfinite(number) else str(number)


def time_shares(seconds: Any) -> list[tuple[str, float]]:
    """Return the sections of a ``seconds`` field with their shares of the sum, largest first; zeros are left out."""
    if not isinstance(seconds, Mapping):
        return []
    spent = {str(k): v for k, v in seconds.items() if (_number(v) or 0) > 0 and math.isfinite(v)}
    whole = sum(spent.values())
    return sorted(((name, value / whole) for name, value in spent.items()), key=lambda item: -item[1])


class ConsoleView:
    """Shows events on a terminal or as lines.

    Args:
        total_steps: steps of the whole run; None takes it from the ``run_start`` event (fields ``total_steps``,
            ``total_epochs``, ``name``).
        total_epochs: likewise.
        name: the run's name.
        file: where to write; None = standard output.
        live: draw a renewing panel; None = only on a terminal.
        seconds_between_lines: shortest time between two plain train lines.
    """

    def __init__(
        self, *, total_steps: int | None = None, total_epochs: float | None = None, name: str = "",
        file: TextIO | None = None, live: bool | None = None, seconds_between_lines: float = 0.0,
    ) -> None:  # fmt: skip
        self._console = Console(file=file, highlight=False, soft_wrap=True)
        self._is_live = self._console.is_terminal if live is None else live
        self._live: Live | None = None
        self._total_steps, self._total_epochs, self._name = total_steps, total_epochs, name
        self._pace = seconds_between_lines
        self._last_line = -math.inf
        self._train: Mapping[str, Any] = {}
        self._clock: deque[tuple[float, float]] = deque(maxlen=RECENT_ROWS)
        self._evaluations: dict[tuple[str, ...], Measurement] = {}
        self._warnings: deque[str] = deque(maxlen=SHOWN_WARNINGS)
        self._note = ""

    def on_event(self, row: Mapping[str, Any]) -> None:
        """Take one event in and show it."""
        self._take(row)
        if self._is_live:
            if self._live is None:
                self._live = Live(console=self._console, auto_refresh=False, transient=False)
                self._live.start()
            self._live.update(self._panel(), refresh=True)
        else:
            line = self._line(row)
            if line:
                self._console.print(Text(line))

    def close(self) -> None:
        """Leave the last panel standing and free the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _take(self, row: Mapping[str, Any]) -> None:
        event = row["event"]
        if event in ("run_start", "restart"):
            self._total_steps = self._total_steps or row.get("total_steps")
            self._total_epochs = self._total_epochs or row.get("total_epochs")
            self._name = self._name or str(row.get("name", ""))
            self._clock.clear()
            self._note = f"resumed at step {row.get('step'):,}" if event == "restart" else ""
        elif event == "train":
            self._train = row
            self._total_steps = self._total_steps or row.get("total_steps")
            self._clock.append((float(row["time"]), float(row["step"])))
        elif event == "evaluation":
            found = parse_measurement(row)
            if found is not None:
                self._evaluations[found.identity] = found
        elif event == "warning":
            self._warnings.append(f"{row.get('code', 'warning')}: {row.get('message', '')}")
        elif event == "run_end":
            self._note = f"ended: {row.get('reason', '')}"

    def _time_left(self) -> float | None:
        if len(self._clock) < 2 or not self._total_steps:
            return None
        (t0, s0), (t1, s1) = self._clock[0], self._clock[-1]
        if s1 <= s0 or t1 <= t0:
            return None
        return seconds_left(step=s1, total_steps=self._total_steps, seconds_per_step=(t1 - t0) / (s1 - s0))

    def _progress(self, row: Mapping[str, Any]) -> str:
        epochs = f"/{self._total_epochs:g}" if self._total_epochs else ""
        steps = f"/{self._total_steps:,}" if self._total_steps else ""
        return f"epoch {_number(row.get('epoch')) or 0:.2f}{epochs}  step {row.get('step', 0):,}{steps}"

    def _line(self, row: Mapping[str, Any]) -> str:
        event, place = row["event"], self._progress(row)
        if event == "train":
            now = time.monotonic()
            if now - self._last_line < self._pace:
                return ""
            self._last_line = now
            split = " ".join(f"{name} {share:.0%}" for name, share in time_shares(row.get("seconds")))
            parts = [f"loss {format_quantity(row.get('loss'))}"]
            parts += [f"{name} {format_quantity(value)}" for name, value in (row.get("terms") or {}).items()]
            if row.get("clean_accuracy") is not None:
                parts.append(f"clean {_percent(row['clean_accuracy'])}")
            if row.get("adv_accuracy") is not None:
                parts.append(f"adv {_percent(row['adv_accuracy'])}")
            parts += [f"lr {format_quantity(row.get('lr'))}"]
            if row.get("eps") is not None:
                parts.append(f"eps {format_quantity(row['eps'])}/255")
            parts += [
                f"{_number(row.get('images_per_second')) or 0:,.0f} img/s",
                f"left {format_seconds(self._time_left())}",
            ]
            return f"{place}  {'  '.join(parts)}" + (f"  [{split}]" if split else "")
        if event == "evaluation":
            found = parse_measurement(row)
            return f"{place}  {_describe(found)}" if found else ""
        if event == "checkpoint":
            return f"{place}  checkpoint {row.get('path', '')} (blocked {format_seconds(_number(row.get('seconds_blocked')))})"
        if event == "warning":
            return f"{place}  WARNING {row.get('code', '')}: {row.get('message', '')}"
        if event == "restart":
            return f"{place}  resumed (restart {row.get('restart', 0)})"
        if event == "run_end":
            return f"{place}  end: {row.get('reason', '')}"
        if event == "run_start":
            return f"run {self._name}" if self._name else "run starts"
        return ""

    def _panel(self) -> Panel:
        row = self._train
        parts: list[Any] = []
        if self._total_steps:
            bar = Table.grid(padding=(0, 2), expand=True)
            bar.add_column(ratio=1)
            bar.add_column(justify="right", no_wrap=True)
            step = min(float(row.get("step", 0)), float(self._total_steps))
            bar.add_row(
                ProgressBar(total=float(self._total_steps), completed=step), f"left {format_seconds(self._time_left())}"
            )
            parts += [bar, Text()]
        grid = Table.grid(padding=(0, 3))
        grid.add_row(*[Text(label, style="dim") for label in ("loss", "clean", "adv", "lr", "eps /255", "img/s")])
        grid.add_row(
            Text(format_quantity(row.get("loss")), style="bold"), Text(_percent(row.get("clean_accuracy")), style="blue"),
            Text(_percent(row.get("adv_accuracy")), style="yellow"), format_quantity(row.get("lr")),
            format_quantity(row.get("eps")), f"{_number(row.get('images_per_second')) or 0:,.0f}",
        )  # fmt: skip
        parts.append(grid)
        terms = row.get("terms") or {}
        if terms:
            parts.append(Text("  ".join(f"{k} {format_quantity(v)}" for k, v in terms.items()), style="dim"))
        shares = time_shares(row.get("seconds"))
        if shares:
            parts.append(Text("time  " + "  ".join(f"{name} {share:.0%}" for name, share in shares), style="dim"))
        parts += [Text(_describe(found)) for found in list(self._evaluations.values())[-6:]]
        parts += [Text(text, style="bold red") for text in self._warnings]
        if self._note:
            parts.append(Text(self._note, style="dim"))
        return Panel(
            Group(*parts),
            title=self._name or None,
            subtitle=self._progress(row),
            title_align="left",
            subtitle_align="left",
        )


def _describe(found: Measurement) -> str:
    place = " ".join(part for part in (found.split, found.protocol, found.branch) if part)
    interval = "" if found.low is None or found.high is None else f"  [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    counts = "" if found.total is None else f"  {found.correct:,}/{found.total:,}"
    return f"{place}  {100 * found.accuracy:.2f}%{interval}{counts}"
