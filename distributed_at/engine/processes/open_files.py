"""How many files a rank holds open for talking to the others, and what the system allows.

Each gloo group connects every pair of ranks by a socket of its own: the default group, the checkpoints', the one whose beat
shows that a rank lives, DeepSpeed's, and on GPUs one for flags that must not wait for the device. Rank 0 is also the
store that all connect to, twice while a run is being set up.
"""

from __future__ import annotations

import resource

from distributed_at.errors import ConfigError

_GROUPS = {"cpu": 4, "cuda": 5}
_STORE = 2
_OTHERS = 128  # libraries, data, logs and checkpoints


def files_needed(world_size: int, device: str) -> int:
    """Return how many open files the busiest of ``world_size`` ranks needs; ``device``: 'cpu' or 'cuda'."""
    return _OTHERS + (_GROUPS.get(device, _GROUPS["cuda"]) + _STORE) * (world_size - 1)


def files_allowed() -> int:
    """Return the hard limit, to which a process may raise its own."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return 2**31 if hard == resource.RLIM_INFINITY else hard


def allow_files(world_size: int, device: str) -> None:
    """Raise this process's limit as far as it may go.

    Raises:
        ConfigError: that is too low for so many ranks, of which gloo would abort in the middle of its set-up.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        wanted = hard if hard != resource.RLIM_INFINITY else max(soft, files_needed(world_size, device))
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    needed = files_needed(world_size, device)
    if world_size > 1 and needed > files_allowed():
        raise ConfigError(
            f"{world_size} ranks need up to {needed} open files each, and this system allows {files_allowed()} "
            "(ulimit -Hn): raise that limit, e.g. LimitNOFILE of the scheduler's daemon, or use fewer workers"
        )
