"""The files of a checkpoint: manifest with sizes and SHA-256, verification, quarantine, durable renames.

Nothing here knows of tensors or ranks. A folder is trusted only after every file in its manifest has been checked, and
no name in a manifest can point outside its folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_at.errors import BadCheckpoint
from distributed_at.files import sync_folder, write_atomically

FORMAT = "distributed_at.checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step_(\d{8,})")
_FILE_NAME = re.compile(r"(?:__\d+_\d+\.distcp|\.metadata)")
_MANIFEST_LIMIT = 256 << 20  # bytes
_BLOCK = 4 << 20  # bytes


@dataclass(frozen=True)
class Manifest:
    """What ``manifest.json`` says: the files with their sizes and hashes, the tensors' shapes, the caller's metadata."""

    step: int
    world_size: int
    files: dict[str, tuple[int, str]]  # name -> (bytes, SHA-256 in hex)
    shapes: dict[str, list[int]]  # tensor name -> shape
    metadata: dict[str, Any]
    created: float  # unix time
    digest: str = ""  # SHA-256 of the manifest itself

    @property
    def num_bytes(self) -> int:
        """Bytes of all data files."""
        return sum(size for size, _ in self.files.values())


def step_name(step: int) -> str:
    """Folder name of a checkpoint."""
    return f"step_{step:08d}"


def open_plain(path: Path) -> int:
    """Open a regular file for reading and return its descriptor; symbolic links and special files are refused."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadCheckpoint(f"{path.name} is a symbolic link") from None
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise BadCheckpoint(f"{path.name} is missing") from None
        raise BadCheckpoint(f"{path.name} cannot be read: {error.strerror}", certain=False) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadCheckpoint(f"{path.name} is not a regular file")
    return descriptor


def hash_file(path: Path) -> tuple[int, str]:
    """Return (bytes, SHA-256 in hex) of a regular file."""
    digest, size = hashlib.sha256(), 0
    with os.fdopen(open_plain(path), "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` with its own hash."""
    body = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "created": manifest.created,
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(manifest.files.items())},
        "shapes": manifest.shapes,
        "metadata": manifest.metadata,
    }
    body["sha256"] = _digest(body)
    write_atomically(folder / MANIFEST, json.dumps(body, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json`` alone; BadCheckpoint says what is wrong with it."""
    if folder.is_symlink():
        raise BadCheckpoint(f"{folder.name} is a symbolic link")
    with os.fdopen(open_plain(folder / MANIFEST), "rb") as file:
        raw = file.read(_MANIFEST_LIMIT + 1)
    if len(raw) > _MANIFEST_LIMIT:
        raise BadCheckpoint(f"{MANIFEST} is larger than {_MANIFEST_LIMIT} bytes")
    try:
        body = json.loads(raw)
        recorded = body.pop("sha256")
        if body["format"] != FORMAT:
            raise BadCheckpoint(f"{MANIFEST} is of format {body['format']!r}, not {FORMAT!r}")
        if body["version"] != VERSION:
            raise BadCheckpoint(
                f"{MANIFEST} is of version {body['version']}; this program reads {VERSION}", certain=False
            )
        if _digest(body) != recorded:
            raise BadCheckpoint(f"{MANIFEST} does not match its own hash")
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in body["files"].items()}
        manifest = Manifest(
            step=int(body["step"]),
            world_size=int(body["world_size"]),
            files=files,
            shapes={name: [int(n) for n in shape] for name, shape in body["shapes"].items()},
            metadata=dict(body["metadata"]),
            created=float(body["created"]),
            digest=recorded,
        )
    except BadCheckpoint:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{MANIFEST} cannot be parsed: {type(error).__name__}: {error}") from None
    named = STEP_NAME.fullmatch(folder.name)
    if named is not None and int(named[1]) != manifest.step:
        raise BadCheckpoint(f"{MANIFEST} is of step {manifest.step}: the folder was renamed")
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name):
            raise BadCheckpoint(f"{MANIFEST} names a file that no checkpoint has: {name!r}")
    if ".metadata" not in manifest.files:
        raise BadCheckpoint(f"{MANIFEST} does not list .metadata")
    return manifest


def check_sizes(folder: Path, manifest: Manifest, *, rank: int = 0, world_size: int = 1) -> None:
    """Check that every listed file of this rank's share is a regular file of the recorded size (no content is read)."""
    for name in _share(manifest, rank, world_size):
        size, _ = manifest.files[name]
        descriptor = open_plain(folder / name)
        try:
            found = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        if found != size:
            raise BadCheckpoint(f"{name} has {found} bytes, its manifest says {size}")


def _share(manifest: Manifest, rank: int, world_size: int) -> list[str]:
    """Return the files that this rank looks at for all: together the ranks open each once."""
    return sorted(manifest.files)[rank::world_size]


def verify(folder: Path) -> Manifest:
    """Check every byte of a checkpoint folder against its manifest and return the manifest; BadCheckpoint otherwise."""
    manifest = read_manifest(folder)
    verify_share(folder, manifest, 0, 1)
    return manifest


def verify_share(folder: Path, manifest: Manifest, rank: int, world_size: int) -> None:
    """Check every byte of this rank's share of the files; BadCheckpoint says what is wrong."""
    check_sizes(folder, manifest, rank=rank, world_size=world_size)
    for name in _share(manifest, rank, world_size):
        recorded = manifest.files[name][1]
        try:
            _, digest = hash_file(folder / name)
        except OSError as error:
            raise BadCheckpoint(f"{name} cannot be read: {error.strerror}", certain=False) from None
        if digest != recorded:
            raise BadCheckpoint(f"{name} does not match its SHA-256")


def list_steps(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of everything named like a checkpoint, newest first; nothing is verified."""
    try:
        names = os.listdir(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(int(match[1]), root / name) for name in names if (match := STEP_NAME.fullmatch(name))]
    return sorted(found, reverse=True)


def quarantine(folder: Path) -> Path | None:
    """Rename a bad checkpoint aside, so that its name is free again; None where the file system does not let us."""
    aside = folder.with_name(f".bad-{folder.name}-{time.time_ns()}")
    try:
        os.rename(folder, aside)
    except OSError:
        return None
    return aside


def quarantined(root: Path) -> list[str]:
    """Names of the checkpoints set aside as bad."""
    return sorted(name for name in os.listdir(root) if name.startswith(".bad-")) if root.is_dir() else []


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint so that a half-removed one can never be taken for a checkpoint."""
    doomed = folder.with_name(f".old-{folder.name}-{time.time_ns()}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def half_replaced(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of checkpoints whose replacement died between its two renames: good, but without a name."""
    if not root.is_dir():
        return []
    found = []
    for name in os.listdir(root):
        match = STEP_NAME.search(name)
        if match and name.startswith(f".old-replaced-{match[0]}-") and not (root / match[0]).exists():
            found.append((int(match[1]), root / name))
    return sorted(found, reverse=True)


def sweep(root: Path) -> None:
    """Remove what an interrupted save or removal left behind; only safe while the run's lock is held."""
    for step, folder in half_replaced(root):
        if not (root / step_name(step)).exists():
            os.rename(folder, root / step_name(step))
    for name in sorted(os.listdir(root)) if root.is_dir() else ():
        if name.startswith((".tmp-", ".old-")):
            shutil.rmtree(root / name, ignore_errors=True)


def commit(temporary: Path, final: Path) -> None:
    """Give a complete temporary folder its name, durably; an older folder of that name is replaced."""
    sync_folder(temporary)
    replaced = None
    if final.exists():
        replaced = final.with_name(f".old-replaced-{final.name}-{time.time_ns()}")
        os.rename(final, replaced)
    os.rename(temporary, final)
    sync_folder(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)
