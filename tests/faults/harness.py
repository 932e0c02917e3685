"""Starts ranks of the real worker by forking a process that has imported everything, so that a start costs little.

A plan is a list of (fault, moment), a function of its seed alone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from distributed_at.engine.processes.launch import free_port
from distributed_at.engine.processes.preemption import prepare_process
from distributed_at.engine.run import run_worker
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.recipes import load_recipe
from tests.patience import STILL, Stuck, wait_until
from tests.training_kit import RECIPE, TINY

Moment = Literal["any", "in_checkpoint", "at_once"]
Inside = Callable[[int], AbstractContextManager]  # rank -> what surrounds that rank's life; picklable


@dataclass(frozen=True)
class Kill:
    """SIGKILL of one rank (None: of all at once) at a moment, ``delay`` seconds after it has come."""

    rank: int | None
    moment: Moment
    delay: float


def plan(seed: int, number: int, world_size: int) -> list[Kill]:
    """Return ``number`` kills; half of them while a checkpoint is written."""
    draw = random.Random(seed)
    kills = []
    for _ in range(number):
        moment: Moment = draw.choices(("in_checkpoint", "any", "at_once"), (5, 4, 1))[0]
        longest = {"in_checkpoint": 0.03, "any": 1.5, "at_once": 0.5}[moment]
        kills.append(Kill(draw.choice([None, *range(world_size)]), moment, draw.uniform(0, longest)))
    return kills


os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed asks when it is imported
_FORKSERVER = multiprocessing.get_context("forkserver")
# the last two are what DeepSpeed and the digits import at their first use: seconds, once instead of in every rank
_FORKSERVER.set_forkserver_preload(
    ["tests.faults.harness", "deepspeed.runtime.zero.muon.muon_optimizer", "sklearn.datasets"]
)


def _enter(
    rank: int, world_size: int, port: int, folder: str, overrides: list[str], inside: Inside, quiet: bool
) -> None:
    """The life of one rank: what `distributed-at train` does in a worker."""
    output = os.open(f"{folder}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DISTRIBUTED_AT_WORKER="1",
    )
    prepare_process()
    torch.set_num_threads(1)
    config = load_recipe(str(RECIPE), [*TINY, *overrides]).config
    with inside(rank):
        code = run_worker(config, RunFolder(Path(folder)), quiet=quiet)
    os._exit(code)


class Start:
    """One start of a run on ``world_size`` ranks, forked from a process that has imported everything already.

    ``inside``: called in each rank with its number; the rank lives inside the context that it returns.
    """

    def __init__(
        self,
        folder: Path,
        world_size: int,
        overrides: Sequence[str] = (),
        *,
        inside: Inside = contextlib.nullcontext,
        quiet: bool = True,
    ) -> None:
        self.folder = folder
        port = free_port()
        self._ranks = [
            _FORKSERVER.Process(
                target=_enter, args=(rank, world_size, port, str(folder), list(overrides), inside, quiet)
            )
            for rank in range(world_size)
        ]
        for process in self._ranks:
            process.start()
        self.codes: dict[int, int] = {}

    def signal(self, rank: int | None, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, or to all."""
        for index, process in enumerate(self._ranks):
            if index not in self.codes and rank in (None, index) and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def alive(self) -> bool:
        """Whether any rank still lives."""
        for index, process in enumerate(self._ranks):
            if index not in self.codes and process.exitcode is not None:
                self.codes[index] = process.exitcode
        return len(self.codes) < len(self._ranks)

    @property
    def processes(self) -> list[int]:
        """Process ids of the ranks that have not ended."""
        return [p.pid for index, p in enumerate(self._ranks) if index not in self.codes and p.pid is not None]

    def wait(self, still: float = STILL) -> dict[int, int]:
        """Wait for all ranks; what has done nothing for ``still`` seconds is killed and counts as killed (-9)."""
        ended = lambda: not self.alive()  # noqa: E731
        try:
            wait_until(ended, "all ranks have ended", processes=self.processes, still=still, pause=0.005)
        except Stuck:
            self.signal(None)
            wait_until(ended, "all ranks have ended")
        return self.codes

    def text(self) -> str:
        """What all starts of this folder printed."""
        return Path(f"{self.folder}.out").read_text(errors="replace")

    def strike(self, kill: Kill) -> bool:
        """Wait for the kill's moment and do it; False where the run was over before."""
        checkpoints, events = self.folder / "checkpoints", self.folder / "events.jsonl"
        begun = events.stat().st_size if events.exists() else 0
        while kill.moment != "at_once":
            if not self.alive():
                return False
            if kill.moment == "in_checkpoint" and any(checkpoints.glob(".tmp-*")):
                break
            if kill.moment == "any" and events.exists() and events.stat().st_size > begun:
                break
            time.sleep(0.001)
        time.sleep(kill.delay)
        if not self.alive() or self.codes:
            return False
        self.signal(kill.rank)
        return True
