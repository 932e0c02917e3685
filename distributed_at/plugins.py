"""A user's own objectives, networks, evaluations …, from a Python file that a recipe names or from installed packages.

A plug-in says what it adds in dicts with the names of our registries, for instance ``OBJECTIVES = {"mine": Mine}``. A
recipe names files: ``plugins: [my_method.py]``, relative to itself; an installed package has an entry point of the group
``distributed_at.plugins`` that names a module with such dicts. Nothing is found by being imported elsewhere.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from distributed_at.errors import ConfigError, did_you_mean
from distributed_at.registry import Registry
from distributed_at.user_code import load_python_file, told_by_line

GROUP = "distributed_at.plugins"
FOLDER = "plugins"  # of a run folder: the files as they were when the run began
# name of the dict in a plug-in -> the registry that its entries join
REGISTRIES = {
    "OBJECTIVES": "distributed_at.catalogue.objectives:OBJECTIVES",
    "EVALUATION_KINDS": "distributed_at.catalogue.evaluations:KINDS",
    "NETWORKS": "distributed_at.catalogue.networks:NETWORKS",
    "DATASETS": "distributed_at.catalogue.datasets:DATASETS",
    "OPTIMIZERS": "distributed_at.catalogue.optimizers:OPTIMIZERS",
    "SCHEDULES": "distributed_at.catalogue.schedules:SCHEDULES",
    "WARMUPS": "distributed_at.catalogue.schedules:WARMUPS",
    "NORMS": "distributed_at.catalogue.norms:NORMS",
    "ATTACK_LOSSES": "distributed_at.catalogue.attacks:ATTACK_LOSSES",
    "ATTACK_TARGETS": "distributed_at.catalogue.attacks:ATTACK_TARGETS",
    "ATTACK_STARTS": "distributed_at.catalogue.attacks:ATTACK_STARTS",
    "ATTACK_UPDATES": "distributed_at.catalogue.attacks:ATTACK_UPDATES",
    "STEP_RULES": "distributed_at.catalogue.attacks:STEP_RULES",
    "BALLS": "distributed_at.catalogue.attacks:BALLS",
}


def registry(name: str) -> Registry[Any]:
    """Return the registry that a plug-in's dict ``name`` fills."""
    module, _, attribute = REGISTRIES[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    assert isinstance(found, Registry)
    return found


def load_plugin(
    path: Path, digest: str | None = None, *, beside: Path | None = None, function: str | None = None
) -> tuple[Path, str]:
    """Run a plug-in file and register what it adds; return its resolved path and SHA-256.

    Args:
        path: the file.
        digest: what its SHA-256 must be; a copy kept in the run folder ``beside`` is taken where the file is another
            now, or gone.
        beside: the run folder.
        function: builds a network that ``model.arch`` names as FILE.py:FUNCTION; the file need not add anything else.

    Raises:
        ConfigError: no such file, a mistake inside it, another content than ``digest``, or nothing that it adds.
    """
    path = path.expanduser().resolve()
    file = _file_of_content(path, digest, beside)
    module = load_python_file(file)
    if function is not None:
        _add_network(module, path, function)
    register(module, origin=str(path), may_be_nothing=function is not None)
    return path, file_digest(file)


def _add_network(module: ModuleType, path: Path, function: str) -> None:
    """Make ``path:function`` a network's name."""
    build = getattr(module, function, None)
    if not callable(build):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise ConfigError(f"{path} has no function {function!r}.{did_you_mean(function, known)}")
    registry("NETWORKS").add(f"{path}:{function}", build, origin=str(path))


def _file_of_content(path: Path, digest: str | None, beside: Path | None) -> Path:
    """Return ``path``, or the copy kept in ``beside`` where its content is not that of ``digest`` any more."""
    file = path
    if digest is not None and (not path.is_file() or file_digest(path) != digest):
        kept = beside / FOLDER / kept_name(path, digest) if beside is not None else None
        if kept is None or not kept.is_file() or file_digest(kept) != digest:
            state = "is not the file that this run began with" if path.is_file() else "does not exist any more"
            raise ConfigError(f"plugins: {path} {state} (sha256 {digest[:12]}…), and no copy of that is kept")
        file = kept
    return file


def register(module: ModuleType, *, origin: str, may_be_nothing: bool = False) -> None:
    """Add what a plug-in's module says to the registries.

    Raises:
        ConfigError: it says nothing, or something that is not understood.
    """
    added = 0
    for name, value in vars(module).items():
        if not name.isupper() or name.startswith("_"):
            continue
        if name not in REGISTRIES:
            if isinstance(value, Mapping) and did_you_mean(name, REGISTRIES):
                raise ConfigError(f"{origin}: {name} is no registry.{did_you_mean(name, REGISTRIES)}")
            continue
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ConfigError(
                f"{origin}: {name} must be a dict of names, e.g. {name} = {{'mine': Mine}}, got {value!r}"
            )
        if getattr(value, "builtin", None) is not None:
            continue  # our own registry, imported by the file
        for key, entry in value.items():
            registry(name).add(key, entry, origin=origin)
            added += 1
    if not added and not may_be_nothing:
        raise ConfigError(
            f"{origin}: a plug-in says what it adds in a dict named {', '.join(REGISTRIES)}; this file has none"
        )


@functools.cache
def load_installed() -> tuple[str, ...]:
    """Register what installed packages add, once a process; return the names of their entry points.

    Raises:
        ConfigError: a package's module fails, with its file and line.
    """
    names = []
    for point in metadata.entry_points(group=GROUP):
        with told_by_line(point.value):
            module = point.load()
        register(module, origin=f"{point.name} ({point.dist.name if point.dist is not None else point.value})")
        names.append(point.name)
    return tuple(names)


def file_digest(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kept_name(path: Path, digest: str) -> str:
    """Return the name under which a run folder keeps a plug-in."""
    return f"{digest[:12]}-{path.name}"
