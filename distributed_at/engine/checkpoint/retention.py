"""Which checkpoints stay: the newest few, the best one, and one of every so many epochs. Nothing is verified here."""

from __future__ import annotations

import json
import math
from pathlib import Path

from distributed_at.engine.checkpoint import files
from distributed_at.engine.checkpoint.files import BadCheckpoint
from distributed_at.files import write_atomically

BEST = "best.json"


def write_best(root: Path, step: int, value: float) -> None:
    """Record the best checkpoint's step and its held-out value."""
    write_atomically(root / BEST, json.dumps({"step": step, "value": value}) + "\n")


def read_best(root: Path) -> Path | None:
    """Return the best checkpoint's folder, or None where none is marked or it is gone."""
    try:
        step = int(json.loads((root / BEST).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    folder = root / files.step_name(step)
    return folder if folder.is_dir() else None


def kept(root: Path, *, keep: int, keep_every_epochs: float | None) -> set[Path]:
    """Folders that stay: the newest ``keep``, the best, and the first of each period of ``keep_every_epochs``."""
    folders = [folder for _, folder in files.list_steps(root)]
    staying = set(folders[:keep])
    if (best := read_best(root)) is not None:
        staying.add(best)
    if keep_every_epochs is not None:
        taken: set[int] = set()
        for folder in reversed(folders):  # oldest first
            try:
                epoch = float(files.read_manifest(folder).metadata["epoch"])
            except (BadCheckpoint, KeyError, TypeError, ValueError):
                continue
            period = math.floor(epoch / keep_every_epochs + 1e-9)
            if period >= 1 and period not in taken:
                taken.add(period)
                staying.add(folder)
    return staying


def prune(newest: Path, *, keep: int, keep_every_epochs: float | None) -> None:
    """Remove what need not stay, oldest first, after ``newest`` has been committed; that one always stays."""
    staying = kept(newest.parent, keep=keep, keep_every_epochs=keep_every_epochs) | {newest}
    for _, folder in reversed(files.list_steps(newest.parent)):
        if folder not in staying:
            files.remove_checkpoint(folder)
