"""Counts what one rank costs at a world size: sockets, writes, and what it opens and lists in the run's folder.

    python -m tests.distributed.counting FOLDER WORLD_SIZE

forks the ranks after everything has been imported, trains a tiny network, goes on from its checkpoint and evaluates it
through the command line, and prints the counts of each part of a run as JSON, with the exit codes of all ranks. Writes are
system calls (gloo makes one a message); the same of one step, one log row, one save, one resume, one evaluation.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPE = """
name: counted
data: {{dataset: digits, image_size: 8, limit_train: {images}, limit_test: {images}}}
model: {{arch: "{network}:small"}}
attack: {{eps: 16, num_steps: 1, step_size: 16}}
objective: {{name: pgd_at}}
optimizer: {{name: sgd, lr: 0.01, momentum: 0.9}}
train: {{epochs: 3, batch_size: {images}, bn_group_size: {group}}}
checkpoint: {{every_steps: 1, asynchronous: false}}
log: {{every_steps: 1}}
parallel: {{zero_stage: 1}}
evaluation: {{validation: [], final: [{{kind: clean}}]}}
"""
NETWORK = """
from torch import nn

def small(num_classes, image_size):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, num_classes))
"""
STEPS_OF_THE_FIRST_START = 2
# by every rank otherwise, for longer than it computes
IMPORTED_ONCE = (
    "distributed_at.engine.run",
    "distributed_at.engine.runs.evaluate_run",
    "distributed_at.objectives.pgd_at",
    "distributed_at.observe.tables",
    "sklearn.datasets",
    "torch._dynamo",
    "torch._functorch.partitioners",
    "torch.utils.cpp_extension",
)
KINDS = ("writes", "opened", "listed", "sockets")


class Counter:
    """This rank's counts; ``parts`` holds what the last call of each watched function took."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._opened = self._listed = 0
        self.parts: dict[str, dict[str, int]] = {}
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(self._folder):
            if event == "open":
                self._opened += 1
            else:
                self._listed += 1

    def now(self) -> dict[str, int]:
        """Return all counts of this process so far, and its open sockets."""
        with open("/proc/self/io") as file:
            writes = int(dict(line.split(": ") for line in file)["syscw"])
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        sockets = sum(os.readlink(link).startswith("socket") for link in links if os.path.lexists(link))
        return {"writes": writes, "opened": self._opened, "listed": self._listed, "sockets": sockets}

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count what each call of ``owner.name`` takes."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            before = self.now()
            result = inner(*args, **kwargs)
            after = self.now()
            taken = {kind: after[kind] - before[kind] for kind in KINDS if kind != "sockets"}
            self.parts[part] = {**taken, "sockets": after["sockets"]}
            return result

        setattr(owner, name, outer)


def _watched(folder: Path) -> Counter:
    from distributed_at.engine.checkpoint.manager import CheckpointManager
    from distributed_at.engine.runs import evaluate_run
    from distributed_at.engine.saving import Checkpoints
    from distributed_at.engine.trainer import Trainer

    counter = Counter(folder)
    counter.watch(CheckpointManager, "load_latest", "resume")
    counter.watch(CheckpointManager, "probe", "first look")
    counter.watch(Trainer, "_step", "step")
    counter.watch(Trainer, "_log_step", "log row")
    counter.watch(Checkpoints, "_save", "save")
    counter.watch(evaluate_run, "measure", "evaluation")
    return counter


def _stop_early() -> None:
    """Ask this rank to stop as a signal would, after some steps."""
    from distributed_at.engine.processes.preemption import StopListener

    asked = iter(range(1, 1000))
    StopListener.stop_requested = lambda self: next(asked) >= STEPS_OF_THE_FIRST_START  # type: ignore[method-assign]


def _rank(rank: int, world_size: int, port: int, folder: Path, words: list[str], part: str) -> None:
    from distributed_at.cli import main

    if part == "train":
        _stop_early()

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DISTRIBUTED_AT_WORKER="1",
    )
    with open(folder / f"{part}-rank{rank}.txt", "w") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    counter = _watched(folder / "run")
    code = main(words)
    (folder / f"{part}-rank{rank}.json").write_text(json.dumps(counter.parts))
    sys.exit(code)


def _forked(world_size: int, folder: Path, words: list[str], part: str) -> dict[str, Any]:
    from distributed_at.engine.processes.launch import free_port
    from distributed_at.errors import EXIT_REQUEUE

    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks = [
        context.Process(target=_rank, args=(rank, world_size, port, folder, words, part)) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    codes = [process.exitcode for process in ranks]
    if any(code != (EXIT_REQUEUE if part == "train" else 0) for code in codes):
        told = "\n".join((folder / f"{part}-rank{rank}.txt").read_text()[-2000:] for rank in range(min(world_size, 4)))
        raise SystemExit(f"{part}: exit codes {codes}\n{told}")
    found = [json.loads((folder / f"{part}-rank{rank}.json").read_text()) for rank in range(world_size)]
    return {
        "exit codes": codes,
        "parts": {
            name: {kind: [counts[name][kind] for counts in found] for kind in KINDS}
            for name in found[0]
        },
    }  # fmt: skip


def count(folder: Path, world_size: int) -> dict[str, Any]:
    """Train, go on and evaluate at a world size; return part -> kind -> a number for each rank."""
    import torch

    from distributed_at.cli import build_parser
    from distributed_at.engine.processes.world import import_deepspeed

    torch.set_num_threads(1)
    import_deepspeed()
    build_parser()
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    folder.mkdir(parents=True)
    images = max(16, 2 * world_size)
    recipe = folder / "counted.yaml"
    (folder / "network.py").write_text(NETWORK)
    recipe.write_text(RECIPE.format(images=images, group=images // world_size, network=folder / "network.py"))
    run = folder / "run"
    train = ["train", str(recipe), "--quiet", "--run-folder", str(run)]
    first = _forked(world_size, folder, train, "train")
    again = _forked(world_size, folder, train, "resume")
    measured = _forked(world_size, folder, ["eval", str(run)], "evaluate")
    parts = {**first["parts"], "resume": again["parts"]["resume"], "evaluation": measured["parts"]["evaluation"]}
    return {
        "world_size": world_size,
        "parts": parts,
        "exit codes": {"train": first["exit codes"], "resume": again["exit codes"], "eval": measured["exit codes"]},
    }


def counted(folder: Path, world_size: int, *, limit: int | None = None) -> dict[str, Any]:
    """Return ``count`` of a process of its own; ``limit``: as by ``ulimit -n``."""
    words = [sys.executable, "-m", "tests.distributed.counting", str(folder), str(world_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    lower: Callable[[], None] | None = None
    if limit is not None:
        lower = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (limit, limit))
    done = subprocess.run(words, capture_output=True, text=True, env=environment, preexec_fn=lower, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(count(Path(sys.argv[1]), int(sys.argv[2]))))
