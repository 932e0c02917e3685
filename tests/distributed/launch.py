"""Run a module-level function on several gloo ranks and collect what each returned."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from distributed_at.engine.processes.launch import free_port
from distributed_at.engine.processes.world import shutdown_world


def _enter(
    rank: int, function: Callable[..., Any], world_size: int, port: int, out: str, args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        DISTRIBUTED_AT_WORKER="1",
    )
    torch.set_num_threads(1)
    try:
        result = function(*args)
        torch.save(result, Path(out) / f"{rank}.pt")
    except BaseException:
        (Path(out) / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        shutdown_world(together=False)


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes with a launcher's environment; return results by rank.

    ``function`` must be importable (module level) and initialise the process group itself where it needs one.
    """
    with tempfile.TemporaryDirectory() as out:
        try:
            mp.spawn(_enter, args=(function, world_size, free_port(), out, args), nprocs=world_size, join=True)
        except Exception as error:
            errors = "\n".join(p.read_text() for p in sorted(Path(out).glob("*.error")))
            raise RuntimeError(f"a rank failed:\n{errors or error}") from error
        return [torch.load(Path(out) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
