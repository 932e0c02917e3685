"""Runs the product's own worker (`engine.run.run_training`) on tiny digits recipes and says what came of it, bit by bit."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from distributed_at.attacks.pgd import PGD
from distributed_at.attacks.threat import Threat
from distributed_at.engine.checkpoint.tools import read_checkpoint
from distributed_at.engine.processes.world import World, import_deepspeed, initialise_world, shutdown_world
from distributed_at.engine.run import run_training
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.observe.events import read_events
from distributed_at.recipes import load_recipe
from distributed_at.rng import EVALUATION_EPOCH

RECIPE = Path(__file__).parents[1] / "digits" / "adversarial.yaml"


def with_words(words, *changes):
    """Return overrides with some of them changed: a key may stand once in a command."""
    changed = {change.partition("=")[0] for change in changes}
    return [*(word for word in words if word.partition("=")[0] not in changed), *changes]


TINY = (
    "data.limit_train=72",
    "data.validation_size=0",
    "model.blocks=[1,1]",
    "model.base_width=4",
    "model.groups=2",
    "attack.num_steps=2",
    "train.batch_size=24",
    "train.bn_group_size=6",
    "train.epochs=3",
    "schedule.warmup_epochs=1",
    "checkpoint.every_epochs=null",
    "evaluation.validation=[]",
    "evaluation.every_epochs=null",
    "train.select=last",
    "log.every_steps=1",
)
TIMES = {
    "time",
    "seconds",
    "wall_seconds",
    "images_per_second",
    "restart",
    "seconds_blocked",
    "seconds_durable",
    "path",
}
Record = tuple[int, int, int, int, int]  # epoch, sample id, crc of its view, crc of its start, target class (-1: none)


class StopAtStep:
    """Stands for a stop signal that arrives while optimiser step number ``step`` (from 1) is computed."""

    def __init__(self, step: int | None, done: int) -> None:
        self._left = None if step is None else step - done

    def stop_requested(self) -> bool:
        if self._left is None:
            return False
        self._left -= 1
        return self._left <= 0

    def set_up_is_over(self) -> None:
        """Nothing waits for it here."""


@functools.cache
def _world() -> World:
    with mock.patch.dict(os.environ):  # a lone worker leaves its rank there, as a launcher would
        if "MASTER_ADDR" not in os.environ:  # no launcher's, but what a test has put there
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                os.environ.pop(name, None)
        import_deepspeed()
        world = initialise_world(60.0)
    atexit.register(shutdown_world)
    return world


def _one_world(timeout_seconds: float = 60.0) -> World:
    """One process group for all runs of this process, whatever their timeout: DeepSpeed remembers the first's groups."""
    return _world()


def checkpoint_step(folder: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    steps = [int(p.name.removeprefix("step_")) for p in (folder / "checkpoints").glob("step_*")]
    return max(steps, default=0)


@contextlib.contextmanager
def one_world() -> Iterator[None]:
    """Let commands that run in this process share its process group, and leave it standing."""
    world = "distributed_at.engine.processes.world"
    with (
        mock.patch(f"{world}.initialise_world", _one_world),
        mock.patch(f"{world}.shutdown_world", return_value=None),
    ):
        yield


def train(folder: Path, overrides: Sequence[str] = (), *, stop_at: int | None = None) -> int:
    """Run ``digits/adversarial.yaml`` made tiny until its end or ``stop_at``; returns the worker's exit code."""
    config = load_recipe(str(RECIPE), [*TINY, *overrides]).config
    stop = StopAtStep(stop_at, checkpoint_step(folder))
    run = "distributed_at.engine.run"
    with (
        mock.patch.dict(os.environ, LOCAL_RANK=os.environ.get("LOCAL_RANK", "0")),  # DeepSpeed asks for it
        mock.patch(f"{run}.start_listening", return_value=stop),
        mock.patch(f"{run}.initialise_world", _one_world),
        mock.patch(f"{run}.shutdown_world", return_value=None),
    ):
        return run_training(config, RunFolder(folder), quiet=True)


def state_digest(folder: Path) -> str:
    """SHA-256 over every tensor (weights, optimiser, average, buffers) of the newest checkpoint."""
    tensors, _ = read_checkpoint(folder)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters in the newest checkpoint."""
    return {n: t for n, t in read_checkpoint(folder)[0].items() if n.startswith("model.")}


def training_rows(folder: Path) -> list[dict[str, Any]]:
    """Training and evaluation rows that stand, without what depends on the clock."""
    rows = [row for row in read_events(folder) if row["event"] in ("train", "evaluation")]
    return sorted(
        ({k: v for k, v in row.items() if k not in TIMES} for row in rows), key=lambda r: (r["step"], r["event"])
    )


@contextlib.contextmanager
def noting(note: Callable[[Record], None]) -> Iterator[None]:
    """Call ``note`` with each training sample's id, view, start and target as the attack gets them."""
    targets: list[int] = []
    start, goal = Threat.random_start, PGD.goal

    def noting_goal(self: PGD, *args: Any, **kwargs: Any) -> Any:
        found = goal(self, *args, **kwargs)
        targets[:] = [-1] * len(found.labels) if found.targets is None else found.targets.tolist()
        return found

    def noting_start(self: Threat, x: torch.Tensor, *, epoch: int, sample_ids: torch.Tensor, **kwargs: Any) -> Any:
        adv = start(self, x, epoch=epoch, sample_ids=sample_ids, **kwargs)
        if epoch != EVALUATION_EPOCH:
            for i, sample in enumerate(sample_ids.tolist()):
                note((epoch, sample, _crc(x[i]), _crc(adv[i]), targets[i]))
        return adv

    with mock.patch.object(Threat, "random_start", noting_start), mock.patch.object(PGD, "goal", noting_goal):
        yield


@contextlib.contextmanager
def recorded() -> Iterator[list[Record]]:
    """Collect what ``noting`` notes."""
    records: list[Record] = []
    with noting(records.append):
        yield records


def _crc(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().numpy().tobytes())
