"""What ranks look at together, each at its share: whether a folder can be written to, and whether a checkpoint is whole."""

from __future__ import annotations

import socket
import uuid
from pathlib import Path

from distributed_at.engine.checkpoint import files
from distributed_at.engine.checkpoint.files import BadCheckpoint, Manifest
from distributed_at.engine.checkpoint.ranks import SHOWN, Ranks, attempt, merge
from distributed_at.engine.checkpoint.reader import SafeReader
from distributed_at.errors import UserError
from distributed_at.files import write_atomically


def examine(folder: Path, ranks: Ranks, *, content: bool) -> tuple[Manifest | None, BadCheckpoint | None]:
    """Look at every file once, each rank at its share, and return this rank's manifest and what is wrong for all.

    ``content``: every byte, else sizes alone.
    """
    manifest, why, certain = None, None, True
    try:
        manifest = files.read_manifest(folder)
        look = files.verify_share if content else files.check_sizes
        look(folder, manifest, rank=ranks.rank, world_size=ranks.world_size)
        if content and ranks.is_first:
            SafeReader(folder, manifest).read_metadata()  # a list that is right may be of rubbish
    except BadCheckpoint as bad:
        why, certain = str(bad), bad.certain
    except OSError as error:
        why, certain = f"{error.strerror}: {error.filename}", False
    found = ranks.gather((why, certain, manifest.digest if manifest is not None else ""))
    failures = [f"rank {rank}: {told}" for rank, (told, _, _) in enumerate(found) if told]
    if failures:
        told, certain, _ = found[0]
        if not told:  # a node that does not see a new file yet is no reason to set the checkpoint aside for all
            certain = ranks.broadcast(ranks.is_first and _certainly_bad(folder))
        return manifest, BadCheckpoint(merge(failures), certain=certain)
    if len({digest for _, _, digest in found}) > 1:
        told = "ranks see different files under this path: the run folder must be on a shared file system"
        return manifest, BadCheckpoint(told, certain=False)
    return manifest, None


def _certainly_bad(folder: Path) -> bool:
    try:
        files.verify(folder)
    except BadCheckpoint as bad:
        return bad.certain
    return False


def probe(root: Path, ranks: Ranks) -> None:
    """Let a rank of every node write and remove a small file, so that a disk that refuses is found before hours are spent.

    Raises:
        UserError: the same on all ranks, where one cannot write, or the ranks do not see one folder.
    """
    mark, hosts = ranks.broadcast(uuid.uuid4().hex), ranks.gather(socket.gethostname())
    path = root / f".probe-{mark}"
    failures = ranks.failures(attempt(lambda: write_atomically(path, "x" * 4096)) if ranks.is_first else None)
    if not failures:
        failure = None
        if not path.exists():
            failure = "does not see what rank 0 wrote; the run folder must be on a file system that all nodes share"
        elif hosts.index(hosts[ranks.rank]) == ranks.rank:  # what a node may, all its ranks may
            own = path.with_name(f"{path.name}-{ranks.rank}")
            failure = attempt(lambda: write_atomically(own, "x" * 4096))
            attempt(own.unlink)
        failures = ranks.failures(failure)
        if ranks.is_first:
            attempt(path.unlink)
    if failures:
        raise UserError(f"cannot write checkpoints to {root}: {'; '.join(failures[:SHOWN])}")
