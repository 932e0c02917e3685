"""Where the ranks meet: the store that all connect to, and the word that a rank leaves there when it cannot go on.

While a run is being set up one rank alone may refuse (its node lacks a file) and the others wait for it in some
collective, for as long as that collective's timeout. So each rank looks into the store twice a second until the set-up
is over, and ends with the message and the exit code of the rank that refused.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import json
import os
import socket
import threading
import time

import torch.distributed as dist

from distributed_at.engine.processes.launch import STORE_FD, Rank, export_rendezvous
from distributed_at.engine.processes.leaving import leave
from distributed_at.errors import ConfigError, UserError, shorten

_REFUSAL, _SEEN = "distributed_at/refusal", "distributed_at/refusal_seen"
_LOOK_SECONDS = 0.5
_TOGETHER_SECONDS = 1.0  # ranks that refuse all at once each tell it in their own words
_LINGER_SECONDS = 20.0  # rank 0 is the store; it stays until the others have read


class PortInUse(UserError):
    """The address where the ranks meet is taken; under a scheduler the next start takes another."""

    exit_code = 1


def meet(rank: Rank, timeout: datetime.timedelta) -> dist.Store:
    """Return the store of this run, once every rank has come to it.

    Raises:
        ConfigError: the port that the environment names is taken on this machine.
        PortInUse: so is the one chosen from the job's number.
    """
    given = "MASTER_PORT" in os.environ and rank.launcher != "self"
    export_rendezvous(rank)
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    held = os.environ.pop(STORE_FD, None)
    if held is not None and rank.rank == 0:  # our launcher listens there already, so that nobody else can
        return dist.TCPStore(host, port, rank.world_size, True, timeout=timeout, master_listen_fd=int(held))
    try:
        store, _, _ = next(dist.rendezvous("env://", rank.rank, rank.world_size, timeout=timeout))
    except (RuntimeError, OSError) as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error).lower():
            raise
        told = f"the ranks cannot meet: port {port} of {socket.gethostname()} is in use by another process"
        if given:
            raise ConfigError(
                f"{told}. MASTER_PORT is {port}: set it to a free port below the system's own, e.g. 29511"
            ) from None
        raise PortInUse(f"{told}. Set MASTER_PORT to a free one, or start again: another is chosen then") from None
    return store


class Refusals:
    """What the ranks of one set-up tell each other through their store.

    Args:
        store: that all ranks have; a connection of its own is opened, because a waiting call holds the first one.
        rank: this process.
    """

    def __init__(self, store: dist.Store, rank: Rank) -> None:
        self._first = store  # on rank 0 it is what serves the others
        self._store = store.clone()
        self._rank = rank
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="refusals", daemon=True)

    def watch(self) -> Refusals:
        """Begin to look for another rank's word."""
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop looking: the set-up is over, or this rank has something to say itself."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def tell(self, message: str, code: int) -> None:
        """Leave this rank's word, unless another was first, and stay until it can be read."""
        self.close()
        time.sleep(_TOGETHER_SECONDS)
        with contextlib.suppress(RuntimeError):  # without the store the others notice by themselves
            word = {"rank": self._rank.rank, "host": socket.gethostname(), "message": message, "code": code}
            self._store.compare_set(_REFUSAL, "", json.dumps(word))
            seen = self._store.add(_SEEN, 1)
            deadline = time.monotonic() + _LINGER_SECONDS
            while self._rank.rank == 0 and seen < self._rank.world_size and time.monotonic() < deadline:
                time.sleep(0.1)
                seen = self._store.add(_SEEN, 0)

    def _look(self) -> None:
        while not self._over.wait(_LOOK_SECONDS):
            try:
                if not self._store.check([_REFUSAL]):
                    continue
                word = json.loads(self._store.get(_REFUSAL))
                self._store.add(_SEEN, 1)
            except (RuntimeError, ValueError):
                return  # rank 0 is gone, which collectives notice
            told = f"rank {word['rank']} on {word['host']}: {word['message']}"
            leave(int(word["code"]), f"distributed-at: error: {told}")


_refusals: Refusals | None = None


def watch_for_refusals(store: dist.Store, rank: Rank) -> None:
    """Let this process end with the message of any rank that refuses, until ``set_up_is_over``."""
    global _refusals
    if rank.world_size > 1:
        _refusals = Refusals(store, rank).watch()
        atexit.register(stop_looking)


def stop_looking() -> None:
    """End the thread: one that still asks the store when the interpreter ends aborts the process. A word can still be left."""
    if _refusals is not None:
        _refusals.close()


def set_up_is_over() -> None:
    """From here on ranks meet in every step, and a loss is noticed there."""
    global _refusals
    if _refusals is not None:
        _refusals.close()
        _refusals = None


def refuse(error: BaseException, code: int, rank: Rank | None) -> None:
    """Tell the others, while the set-up lasts, why this rank ends; also where it has not met them yet."""
    global _refusals
    if _refusals is None:
        if rank is None or rank.world_size == 1 or dist.is_initialized():
            return
        with contextlib.suppress(Exception):
            _refusals = Refusals(meet(rank, datetime.timedelta(seconds=_LINGER_SECONDS)), rank)
    if _refusals is not None:
        text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        _refusals.tell(shorten(text), code)
        _refusals = None
