"""This process among the others: the process group, the device, and the few collectives of a step."""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.util
import os
import sys
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from distributed_at.cores import core_share
from distributed_at.engine.processes.launch import detect_rank
from distributed_at.engine.processes.open_files import allow_files
from distributed_at.engine.processes.rendezvous import meet, set_up_is_over, stop_looking, watch_for_refusals
from distributed_at.exchange import connect, first_object, gather_objects
from distributed_at.groups import forget_groups

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the workers, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup | None = None  # gloo, for flags that must not wait for the GPU; None: the world

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def import_deepspeed() -> None:
    """Import DeepSpeed, where it is installed, while there is no process group yet.

    Its functions have the default group for a default argument: imported later, they would keep it to the process's end.
    """
    if dist.is_initialized() or not deepspeed_available():
        return
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it asks when it is imported
    importlib.import_module("deepspeed")


def initialise_world(timeout_seconds: float = 1800.0) -> World:
    """Join the process group that the launcher described; alone, make a group of one."""
    found = detect_rank()
    rank, local_rank, world_size = (found.rank, found.local_rank, found.world_size) if found else (0, 0, 1)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if "OMP_NUM_THREADS" not in os.environ:  # srun and DeepSpeed's launcher set none: each rank would take all cores
        torch.set_num_threads(min(torch.get_num_threads(), core_share()))
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # else each group connects every pair of ranks
    allow_files(world_size, "cuda" if torch.cuda.is_available() else "cpu", rank=rank)
    if torch.cuda.is_available():
        # srun with --gpus-per-task shows one GPU to each task, which is then device 0
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        device, backend = torch.device("cpu"), "gloo"
    if found is not None:
        store = meet(found, timeout)
        watch_for_refusals(store, found)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout) if backend != "gloo" else None  # None: the world
    control = cast("dist.ProcessGroup | None", control)
    connect(control)
    return World(rank, world_size, local_rank, device, control)


def shutdown_world(*, together: bool = True) -> None:
    """End every process group and its threads; a process that ends with one may abort, and its finished job looks failed.

    A group lives as long as something holds it: call this where the caller's own frames hold no engine, no network with
    groups in its BN layers and no checkpoint manager any more.

    ``together``: all ranks come here, so they wait for each other. After a failure of this rank alone nobody is waited
    for, and NCCL's communicator is left to the process's end, because taking it down can block.
    """
    stop_looking()
    if not dist.is_initialized():
        return
    if together:
        set_up_is_over()
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    elif "nccl" in str(dist.get_backend_config()):
        return
    comm = sys.modules.get("deepspeed.comm")
    with contextlib.suppress(RuntimeError):
        # DeepSpeed's own call also lets go of the groups that DeepSpeed made
        (comm if comm is not None and comm.is_initialized() else dist).destroy_process_group()
    forget_groups()
    gc.collect()  # an engine and what surrounds it point to one another


def sum_over_ranks(world: World, values: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks (float64 scalars of logging, flattened BN buffers)."""
    if world.world_size > 1:
        dist.all_reduce(values)
    return values


def gather_all(value: T, world: World) -> list[T]:
    """Return every rank's small object, in rank order, on all ranks."""
    return [value] if world.world_size == 1 else gather_objects(value, world.control)


def from_main(value: T, world: World) -> T:
    """Return rank 0's small object on all ranks; the others' are not sent."""
    return value if world.world_size == 1 else first_object(value, world.control)


def deepspeed_available() -> bool:
    """Whether DeepSpeed can be imported here."""
    return importlib.util.find_spec("deepspeed") is not None
