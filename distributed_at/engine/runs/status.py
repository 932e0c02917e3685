"""Where a run stands, read from its folder alone: for people, schedulers and pages that list runs.

Needs neither torch nor the run's data, and changes nothing, so it may look at a live run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distributed_at.engine.checkpoint import files
from distributed_at.engine.checkpoint.files import BadCheckpoint
from distributed_at.engine.runs.lock import RunLock
from distributed_at.errors import LockedError, exit_class
from distributed_at.observe.events import read_events

_ENDS = {"finished", "early", "collapsed"}
_ADVICE = {
    "done": "nothing: the run has come to its end; evaluate it, or give a longer run another name and train.init_from",
    "again": "give the same command again: it goes on at the newest checkpoint",
    "person": "read the message that the run ended with; the same command would end in the same way",
    "crash": "give the same command again; if it ends so without a newer checkpoint, look into log/",
    "wait": "nothing: it is running",
}


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
        run: folder.
        started: whether the folder holds a run at all.
        finished: the run has come to its end; the same command would do nothing.
        reason: how its last start ended: 'finished', 'early', 'collapsed', 'stopped' (asked to, saved), None where it did
            not say.
        step: the last step that its events name; total_steps: of the recipe, None before the first start.
        checkpoint: name of the newest good checkpoint; checkpoint_step: its step, 0 without one.
        bad_checkpoints: newer ones that cannot be used, each with the reason.
        running: a live process holds the folder's lock; None where that cannot be told.
        holder: who holds the lock, living or dead.
        exit_class: what follows: 'done', 'again', 'person', 'crash' (``errors.exit_class``), or 'wait' while it runs.
        advice: the same in words.
    """

    run: str
    started: bool
    finished: bool
    reason: str | None
    step: int
    total_steps: int | None
    checkpoint: str | None
    checkpoint_step: int
    bad_checkpoints: dict[str, str]
    running: bool | None
    holder: str | None
    exit_class: str
    advice: str

    def as_dict(self) -> dict[str, Any]:
        """Return the status as JSON types."""
        return asdict(self)


def run_status(folder: Path, *, exit_code: int | None = None, verify: bool = False) -> Status:
    """Look at a run folder.

    Args:
        folder: the run's; an absent one is a run that was not started.
        exit_code: what the run's process ended with; what follows is then judged by it alone, else by the folder.
        verify: read every byte of the newest checkpoint; otherwise its manifest and the sizes of its files.
    """
    ends = [row for row in read_events(folder, raw=True) if row["event"] in ("run_start", "restart", "run_end")]
    last = ends[-1] if ends else None
    reason = str(last.get("reason")) if last is not None and last["event"] == "run_end" else None
    rows = read_events(folder)
    totals = [row["total_steps"] for row in rows if isinstance(row.get("total_steps"), int)]
    newest, bad = _newest_good(folder / "checkpoints", verify=verify)
    running, holder = _lock(folder)
    finished = reason in _ENDS
    if exit_code is not None:
        what = exit_class(exit_code)
    elif finished:
        what = "done"
    elif running:
        what = "wait"
    elif bad and newest is None:
        what = "person"
    else:
        what = "again" if reason == "stopped" or last is None else "crash"
    return Status(
        run=str(folder),
        started=last is not None,
        finished=finished,
        reason=reason,
        step=max((row["step"] for row in rows if isinstance(row.get("step"), int)), default=0),
        total_steps=totals[-1] if totals else None,
        checkpoint=newest[1].name if newest is not None else None,
        checkpoint_step=newest[0] if newest is not None else 0,
        bad_checkpoints=bad,
        running=running,
        holder=holder,
        exit_class=what,
        advice=_ADVICE[what] if what != "again" or last is not None else "start it: distributed-at train RECIPE",
    )


def _newest_good(root: Path, *, verify: bool) -> tuple[tuple[int, Path] | None, dict[str, str]]:
    """Return (step, folder) of the newest good checkpoint, and why newer ones are none."""
    bad: dict[str, str] = {}
    for step, folder in files.list_steps(root):
        try:
            if verify:
                files.verify(folder)
            else:
                files.check_sizes(folder, files.read_manifest(folder))
        except BadCheckpoint as error:
            bad[folder.name] = str(error)
        else:
            return (step, folder), bad
    return None, bad


def _lock(folder: Path) -> tuple[bool | None, str | None]:
    """Return whether a live process holds the folder, and who."""
    if not folder.is_dir():
        return False, None
    try:
        holder, dead = RunLock(folder).look()
    except LockedError:
        return None, None
    if holder is None:
        return False, None
    return dead is None, f"{holder}" if dead is None else f"{holder}: {dead}"
