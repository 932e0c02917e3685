"""How many files a rank holds open for talking to the others, and what the system allows.

Connections are made when they are first used. In each gloo group a rank talks with those at distances 1, 2, 4, … on both
sides. Rank 0 is also the store that all connect to, twice while a run is being set up, and collects what each rank is
going to write into a checkpoint; so it alone needs more with every rank.
"""

from __future__ import annotations

import math
import resource

from distributed_at.errors import ConfigError

_GROUPS = 4  # the default one or that for flags, the checkpoints', an evaluation's pulse, DeepSpeed's
_OF_FIRST = 3  # sockets of rank 0 for each other rank: two to the store, one to collect
_OTHERS = {"cpu": 96, "cuda": 384}  # libraries, data, logs and checkpoints; on GPUs the driver and NCCL


def files_needed(world_size: int, device: str, *, rank: int = 0) -> int:
    """Return how many open files a rank of ``world_size`` needs, rank 0 the most; ``device``: 'cpu' or 'cuda'."""
    neighbours = min(world_size - 1, 2 * math.ceil(math.log2(max(1, world_size))))
    first = _OF_FIRST * (world_size - 1) if rank == 0 else 1
    return _OTHERS.get(device, _OTHERS["cuda"]) + _GROUPS * neighbours + first


def files_allowed() -> int:
    """Return the hard limit, to which a process may raise its own."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 2**31 if hard == resource.RLIM_INFINITY else hard


def allow_files(world_size: int, device: str, *, rank: int = 0) -> None:
    """Raise this process's limit as far as it may go.

    Raises:
        ConfigError: that is too low for so many ranks, of which gloo would abort in the middle of its set-up.
    """
    needed = files_needed(world_size, device, rank=rank)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        wanted = hard if hard != resource.RLIM_INFINITY else max(soft, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if world_size > 1 and needed > files_allowed():
        raise ConfigError(
            f"rank {rank} of {world_size} needs up to {needed} open files, and this system allows {files_allowed()} "
            "(ulimit -Hn): raise that limit, e.g. LimitNOFILE of the scheduler's daemon, or use fewer workers"
        )
