"""SIGKILLs ranks at random moments of many short runs and counts the runs that end as the uninterrupted one.

python -m tests.faults.kill_many --kills 200
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distributed_at.observe.events import read_events
from tests.faults.harness import Start, plan
from tests.training_kit import state_digest, training_rows

INTERVAL = 3  # steps between checkpoints
MOST_REPEATED = 2 * INTERVAL  # a save begins when the one before it has ended, so two intervals may be in the air
OVERRIDES = ["train.epochs=8", f"checkpoint.every_steps={INTERVAL}", "parallel.timeout_seconds=60"]
KILLS_PER_RUN = 4
WORLD = 2
PATIENCE = 8.0  # seconds until ranks that wait for a dead one at the rendezvous are killed, as launchers do


@dataclass
class Count:
    """What came of all kills."""

    kills: int = 0
    runs: int = 0
    equal: int = 0
    moments: Counter = field(default_factory=Counter)
    repeated: Counter = field(default_factory=Counter)  # steps done again after a kill -> how often
    failures: list[str] = field(default_factory=list)

    @property
    def most_repeated(self) -> int:
        return max(self.repeated, default=0)


def repeated_steps(folder: Path) -> list[int]:
    """Steps that each start after the first did again: the last step logged before it less the one it began from."""
    reached, repeated = 0, []
    for row in read_events(folder, raw=True):
        if row["event"] in ("restart", "run_start"):
            if row["restart"] > 0:
                repeated.append(max(0, reached - row["step"]))
        elif row["event"] == "train":
            reached = max(reached, row["step"])
    return repeated


def kill_many(
    kills: int, *, seed: int = 0, root: Path, words: Sequence[str] = (), say: Callable[[str], None] = lambda text: None
) -> Count:
    """Do ``kills`` kills in runs of at most ``KILLS_PER_RUN`` each; compare each run's end with the uninterrupted one."""
    whole, overrides = root / "whole", [*OVERRIDES, *words]
    codes = Start(whole, WORLD, overrides).wait()
    assert set(codes.values()) == {0}, Path(f"{whole}.out").read_text()
    digest, rows = state_digest(whole), training_rows(whole)
    count = Count()
    pending = plan(seed, 4 * kills + 8, WORLD)  # some come too late
    while count.kills < kills:
        folder = root / f"run{count.runs}"
        count.runs += 1
        for _ in range(min(KILLS_PER_RUN, kills - count.kills)):
            kill = pending.pop(0) if pending else plan(seed + count.runs, 1, WORLD)[0]
            start = Start(folder, WORLD, overrides)
            if not start.strike(kill):
                start.wait()
            else:
                count.kills += 1
                count.moments[kill.moment, "all" if kill.rank is None else "one rank"] += 1
            codes = start.wait(PATIENCE)
            wrong = [c for c in codes.values() if c not in (0, -9, 6)]
            if wrong:
                count.failures.append(f"{folder.name}: {kill}: exit codes {codes}")
        codes = Start(folder, WORLD, overrides).wait()
        same = set(codes.values()) == {0} and state_digest(folder) == digest and training_rows(folder) == rows
        count.equal += same
        if not same:
            count.failures.append(f"{folder.name}: final state differs, exit codes {codes}")
        count.repeated.update(repeated_steps(folder))
        say(
            f"{count.kills} kills, runs equal {count.equal} / {count.runs}, steps repeated at most {count.most_repeated}"
        )
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--synchronous", action="store_true", help="checkpoint.asynchronous=false")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        words = ["checkpoint.asynchronous=false"] if args.synchronous else []
        count = kill_many(
            args.kills, seed=args.seed, root=Path(root), words=words, say=lambda text: print(text, flush=True)
        )
    for (moment, who), number in sorted(count.moments.items()):
        print(f"  {moment:14} {who:9} {number}")
    print("steps repeated: " + ", ".join(f"{n} ({times} times)" for n, times in sorted(count.repeated.items())))
    print(f"{count.kills} SIGKILLs in {time.monotonic() - began:.0f} s: final state equal to the uninterrupted run's")
    print(f"{count.equal} / {count.runs}; steps repeated at most {count.most_repeated} (interval {INTERVAL})")
    print("\n".join(count.failures))
    most = INTERVAL if args.synchronous else MOST_REPEATED
    return 0 if count.equal == count.runs and not count.failures and count.most_repeated <= most else 1


if __name__ == "__main__":
    sys.exit(main())
