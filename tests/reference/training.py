"""Trains cases with the product's own path, in this process or in two, and reads what their run folders hold."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from distributed_at.engine.checkpoint.tools import read_checkpoint
from distributed_at.engine.run import run_training
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.errors import EXIT_OK
from distributed_at.observe.events import read_events
from tests.distributed.launch import run_ranks
from tests.reference.cases import CASES, Case, initial_state
from tests.reference.double import in_float64
from tests.training_kit import StopAtStep, _one_world

Job = tuple[str, tuple[int, int], str]  # name of a case, (ranks, forwards), folder
FIXED = ("event", "time", "restart", "seconds", "wall_seconds", "images_per_second")


def initial_file(case: Case, folder: Path) -> Path:
    """Write what a case begins with and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "initial.pt"
    if not path.exists():
        path.touch()  # the recipe wants to see it
        torch.save(initial_state(case.config((1, 1), path)), path)
    return path


@contextlib.contextmanager
def _as(case: Case) -> Iterator[None]:
    run = "distributed_at.engine.run"
    with contextlib.ExitStack() as stack:
        # one process group for all runs of a process: DeepSpeed remembers the groups of the first
        stack.enter_context(mock.patch(f"{run}.initialise_world", _one_world))
        stack.enter_context(mock.patch(f"{run}.shutdown_world"))
        stack.enter_context(mock.patch(f"{run}.start_listening", return_value=StopAtStep(None, 0)))
        stack.enter_context(mock.patch.dict(os.environ, LOCAL_RANK=os.environ.get("LOCAL_RANK", "0")))
        if case.double:
            stack.enter_context(in_float64())
        if not case.deepspeed:
            stack.enter_context(mock.patch("distributed_at.engine.parallel.deepspeed_available", return_value=False))
        yield


def train(jobs: Sequence[Job]) -> None:
    """Train each job on this rank, one after another in one process group."""
    torch.set_num_threads(1)
    for name, world, folder in jobs:
        case, root = CASES[name], Path(folder)
        config = case.config(world, root / "initial.pt")
        with _as(case):
            assert run_training(config, RunFolder(root / "run"), quiet=True) == EXIT_OK


def train_all(jobs: Sequence[Job]) -> None:
    """Train jobs of any world; those of two ranks share one pair of processes."""
    for name, _, folder in jobs:
        initial_file(CASES[name], Path(folder))
    train([job for job in jobs if job[1][0] == 1])
    if pairs := [job for job in jobs if job[1][0] == 2]:
        run_ranks(train, 2, pairs)


def found(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Return the tensors of a run's last checkpoint, and the rows of its log with images in place of times."""
    tensors, _ = read_checkpoint(folder / "run")
    rows = []
    for row in read_events(folder / "run"):
        if row["event"] == "train":
            images = row["images_per_second"] * row["wall_seconds"]
            rows.append({**{k: v for k, v in row.items() if k not in FIXED}, "images": images})
    return tensors, rows
