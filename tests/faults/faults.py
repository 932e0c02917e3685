"""What a row of the table of faults is: code that plants one fault in a real run, and what is then seen and lost.

A fault does its thing, checks what must hold, and says what it saw. ``table.py`` prints all of them; ``test_faults.py``
runs each as a test.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_at.errors import EXIT_OK, UserError
from distributed_at.observe.events import read_events
from tests.faults.harness import Inside, Start
from tests.faults.kill_many import repeated_steps
from tests.training_kit import state_digest, train, training_rows

SAVING = ["checkpoint.every_steps=2", "checkpoint.asynchronous=false"]  # of 9 steps
INTERVAL = 2
EQUAL = "bitwise the undisturbed run"
SILENT = "(nothing)"


@dataclass(frozen=True)
class Seen:
    """What one fault did to a run.

    Attributes:
        message: what the user reads, literally; the run's folder stands as RUN, this host as HOST.
        exit_code: of the start that the fault struck, by rank where ranks differ.
        repeated: steps that were computed again because of the fault; None where nothing had been computed.
        end: what the state at the end is.
    """

    message: str
    exit_code: str
    repeated: int | None = 0
    end: str = EQUAL


@dataclass(frozen=True)
class Fault:
    """A kind of fault, and the code that plants it."""

    name: str
    plant: Callable[[Bench], Seen]
    slow: bool = False  # more than a few seconds
    root: bool = False  # needs to mount a file system


FAULTS: list[Fault] = []


def fault(name: str, *, slow: bool = False, root: bool = False) -> Callable[[Callable[[Bench], Seen]], None]:
    """Enter the decorated function into the table."""

    def enter(plant: Callable[[Bench], Seen]) -> None:
        FAULTS.append(Fault(name, plant, slow, root))

    return enter


class Undisturbed:
    """Runs without a fault, one for each number of ranks and recipe; made when first asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._made: dict[tuple[int, tuple[str, ...]], Path] = {}

    def get(self, world_size: int = 1, words: Sequence[str] = ()) -> Path:
        """Return the folder of the undisturbed run."""
        key = (world_size, tuple(words))
        if key not in self._made:
            folder = self._root / f"undisturbed{len(self._made)}"
            if world_size == 1:
                assert train(folder, [*SAVING, *words]) == EXIT_OK
            else:
                start = Start(folder, world_size, [*SAVING, *words])
                assert set(start.wait().values()) == {EXIT_OK}, start.text()
            self._made[key] = folder
        return self._made[key]


class Bench:
    """One run to be disturbed, and the undisturbed one beside it."""

    def __init__(self, folder: Path, undisturbed: Undisturbed) -> None:
        self.folder = folder
        self.undisturbed = undisturbed

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def newest(self) -> Path:
        """The newest checkpoint's folder."""
        return max(self.checkpoints.glob("step_*"))

    def train(self, stop_at: int | None = None, words: Sequence[str] = ()) -> tuple[int, str]:
        """Give the command in this process; return its exit code and the error's message ("" without one)."""
        try:
            return train(self.folder, [*SAVING, *words], stop_at=stop_at), ""
        except UserError as error:
            return error.exit_code, f"distributed-at: error: {error}"

    def start(self, inside: Inside, *, world_size: int = 2, words: Sequence[str] = (), quiet: bool = True) -> Start:
        """Give the command in processes of their own, each rank living inside what ``inside(rank)`` returns."""
        return Start(self.folder, world_size, [*SAVING, *words], inside=inside, quiet=quiet)

    def events(self, kind: str) -> list[dict]:
        return [row for row in read_events(self.folder, raw=True) if row["event"] == kind]

    def warning(self, code: str) -> str:
        """The message of the first warning of this code; AssertionError where there is none."""
        found = [row["message"] for row in self.events("warning") if row["code"] == code]
        assert found, f"no warning {code} among {self.events('warning')}"
        return f"WARNING {code}: {found[0]}"

    def as_undisturbed(self, world_size: int = 1, words: Sequence[str] = ()) -> bool:
        """Whether rows and whole state at the end are bitwise the undisturbed run's."""
        whole = self.undisturbed.get(world_size, words)
        return training_rows(self.folder) == training_rows(whole) and state_digest(self.folder) == state_digest(whole)

    def goes_on(
        self,
        message: str,
        exit_code: int | str,
        *,
        world_size: int = 1,
        words: Sequence[str] = (),
        most: int = INTERVAL,
    ) -> Seen:
        """Give the same command again; check that it ends as if undisturbed, having repeated at most ``most`` steps."""
        if world_size == 1:
            code, told = self.train(words=words)
            assert code == EXIT_OK, told
        else:
            again = Start(self.folder, world_size, [*SAVING, *words])
            assert set(again.wait().values()) == {EXIT_OK}, again.text()
        return self.ended(message, exit_code, world_size=world_size, words=words, most=most)

    def ended(
        self,
        message: str,
        exit_code: int | str,
        *,
        world_size: int = 1,
        words: Sequence[str] = (),
        most: int = INTERVAL,
    ) -> Seen:
        """As ``goes_on`` where the run has come to its end already."""
        assert self.as_undisturbed(world_size, words)
        repeated = max(repeated_steps(self.folder), default=0)
        assert repeated <= most
        return Seen(self.plain(message), str(exit_code), repeated)

    def plain(self, message: str) -> str:
        """The message without what differs from place to place: the run's folder, the host, process ids, the time."""
        text = (
            message.replace(str(self.folder), "RUN")
            .replace(str(self.folder.parent), "FOLDER")
            .replace(socket.gethostname(), "HOST")
            .strip()
        )
        text = re.sub(r"(manifest\.json)\.\d+\.[0-9a-f]{8}", r"\1", text)
        text = re.sub(r"process \d+", "process N", text)
        text = re.sub(r"\[127\.0\.0\.1\]:\d+", "PEER", text)
        text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
        return " ".join(text.split()) or SILENT


@contextlib.contextmanager
def log_lines() -> Iterator[list[str]]:
    """Collect what the product's logger would print."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("distributed_at")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def told(start: Start) -> str:
    """The first message of the product in what the ranks of a start printed."""
    lines = [line for line in start.text().split("\n") if line.startswith(("distributed-at: error", "rank "))]
    assert lines, start.text()
    return lines[0]


def by_rank(start: Start) -> str:
    """Exit codes of all ranks: one where they agree."""
    codes = [start.codes[rank] for rank in sorted(start.codes)]
    return str(codes[0]) if len(set(codes)) == 1 else ", ".join(f"rank {r}: {code}" for r, code in enumerate(codes))
