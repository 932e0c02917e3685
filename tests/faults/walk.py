"""One run walks through world sizes, each change a SIGKILL of one rank at a random moment, beside the undisturbed run.

python -m tests.faults.walk --worlds 2,1,3,4,2
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distributed_at.engine.checkpoint.tools import read_checkpoint
from distributed_at.observe.events import read_events
from tests.distributed.test_elastic import FIRST, FIRST_TOLERANCE, LOSS_TOLERANCE, RECIPE, STEPS
from tests.faults.harness import Start
from tests.training_kit import Record, noting

INTERVAL = 3  # steps between checkpoints
WORDS = [*RECIPE, f"checkpoint.every_steps={INTERVAL}", "parallel.timeout_seconds=60"]
ALL_KEPT = "checkpoint.keep=1000"  # of the undisturbed run, to compare with at any step
Row = dict[str, object]


@dataclass(frozen=True)
class RecordFile:
    """Appends what each rank's attacks are given to a file, so that a SIGKILL loses none of it."""

    path: Path

    @contextlib.contextmanager
    def __call__(self, rank: int) -> Iterator[None]:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with noting(lambda record: os.write(descriptor, f"{json.dumps(record)}\n".encode()) and None):
            yield

    def read(self) -> set[Record]:
        """The whole lines of the file; a line cut by a kill is left out."""
        lines = self.path.read_text().split("\n")[:-1]
        return {tuple(json.loads(line)) for line in lines}


@dataclass
class Leg:
    """What one start of the walk did, against the undisturbed run."""

    ranks: int
    killed: int | None  # rank
    resumed_from: int
    reached: int  # last step whose row was written
    repeated: int  # steps done again that the legs before had done
    same_samples: bool  # every id, view, target and start that this leg used
    bitwise: bool  # losses and weights
    loss_difference: float
    weight_difference: float | None  # of the newest checkpoint that this leg wrote; None: it wrote none

    HEADER = (
        f"{'ranks':>5} {'killed':>8} {'at step':>7} {'from step':>9} {'repeated':>8}"
        f"  {'ids, views, targets, starts':27} {'losses within':>13} {'weights within':>14}"
    )

    def __str__(self) -> str:
        killed = "-" if self.killed is None else f"rank {self.killed}"
        same = "bitwise equal" if self.same_samples else "DIFFERENT"
        differences = (self.loss_difference, self.weight_difference)
        losses, weights = ("none written" if d is None else f"{d:.1e}" if d else "0" for d in differences)
        return (
            f"{self.ranks:>5} {killed:>8} {self.reached:>7} {self.resumed_from:>9} {self.repeated:>8}"
            f"  {same:27} {losses:>13} {weights:>14}"
        )


def _losses(folder: Path, restart: int | None = None) -> dict[int, float]:
    rows = (row for row in read_events(folder, raw=True) if row["event"] == "train")
    return {row["step"]: row["loss"] for row in rows if restart in (None, row["restart"])}


def _state(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for n, t in read_checkpoint(path)[0].items() if t.is_floating_point()}


def _weight_difference(folder: Path, whole: Path, since: int) -> float | None:
    """Largest difference of parameters and statistics in the newest checkpoint after ``since``; None without one."""
    newest = max((folder / "checkpoints").glob("step_*"), default=None)
    if newest is None or int(newest.name.removeprefix("step_")) <= since:
        return None
    mine, other = _state(newest), _state(whole / "checkpoints" / newest.name)
    return max(float((mine[name] - other[name]).abs().max()) for name in mine if name.startswith(("model.", "buffer.")))


def _wait_steps(start: Start, number: int) -> None:
    """Wait until the newest start has logged ``number`` steps of its own."""
    path = start.folder / "events.jsonl"
    begun = path.stat().st_size if path.exists() else 0
    while start.alive():
        if path.exists() and path.read_bytes()[begun:].count(b'"event": "train"') >= number:
            return
        time.sleep(0.001)
    raise RuntimeError(f"the run was over before its kill:\n{start.text()}")


def walk(worlds: Sequence[int], *, seed: int, root: Path, say: Callable[[object], None] = lambda _: None) -> list[Leg]:
    """Walk one run through ``worlds`` and compare every leg with the undisturbed run at ``worlds[0]`` ranks."""
    draw = random.Random(seed)
    whole, folder = root / "whole", root / "walk"
    records = RecordFile(root / "whole.records")
    start = Start(whole, worlds[0], [*WORDS, ALL_KEPT], inside=records)
    assert set(start.wait().values()) == {0}, start.text()
    expected, losses = records.read(), _losses(whole)
    seen: set[Record] = set()
    legs: list[Leg] = []
    for number, world in enumerate(worlds):
        records = RecordFile(root / f"leg{number}.records")
        last = number + 1 == len(worlds)
        # room for all legs: each one gets on by its share of the steps before it is killed
        steps, delay = draw.randint(INTERVAL + 1, STEPS // len(worlds)), draw.uniform(0, 0.05)
        killed = None if last else draw.randrange(world)
        start = Start(folder, world, WORDS, inside=records)
        if not last:
            _wait_steps(start, steps)
            time.sleep(delay)
            start.signal(killed)
        codes = start.wait()
        assert set(codes.values()) <= ({0} if last else {-9, 6}), start.text()
        rows = [row for row in read_events(folder, raw=True) if row["restart"] == number]
        began = next(int(row["step"]) for row in rows if row["event"] in ("run_start", "restart"))
        own = _losses(folder, number)
        used = records.read()
        differences = [abs(own[step] - losses[step]) for step in own]
        weights = _weight_difference(folder, whole, began)
        leg = Leg(
            ranks=world,
            killed=killed,
            resumed_from=began,
            reached=max(own),
            repeated=max((leg.reached for leg in legs), default=0) - began,
            same_samples=used <= expected,
            bitwise=not any(differences) and not weights,
            loss_difference=max(differences),
            weight_difference=weights,
        )
        seen |= used
        legs.append(leg)
        say(leg)
    assert seen == expected, "some samples were never used"
    assert _losses(folder).keys() == losses.keys()
    return legs


def check(legs: Sequence[Leg]) -> None:
    """Assert what is promised of every leg."""
    for leg in legs:
        assert leg.same_samples, leg
        assert leg.loss_difference < (LOSS_TOLERANCE if leg.reached > FIRST else FIRST_TOLERANCE), leg
        assert 0 <= leg.repeated <= 2 * INTERVAL, leg
    same = next((n for n, leg in enumerate(legs) if leg.ranks != legs[0].ranks), len(legs))
    assert all(leg.bitwise for leg in legs[:same]), "equal world sizes differ"
    assert legs[-1].reached == STEPS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", default="2,1,3,4,2", help="ranks of each leg")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    worlds = [int(word) for word in args.worlds.split(",")]
    print(f"against {worlds[0]} ranks undisturbed, {STEPS} steps; a checkpoint every {INTERVAL} steps")
    print(f"tolerance of losses near 2: {FIRST_TOLERANCE:.0e} over {FIRST} steps, {LOSS_TOLERANCE:.0e} over {STEPS}")
    print(Leg.HEADER, flush=True)
    with tempfile.TemporaryDirectory() as root:
        check(walk(worlds, seed=args.seed, root=Path(root), say=lambda leg: print(leg, flush=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
