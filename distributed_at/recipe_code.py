"""The code that a recipe names, plug-ins and networks of files: loaded, and written down with its content's hash."""

from __future__ import annotations

from pathlib import Path

from distributed_at.catalogue.networks import file_of
from distributed_at.errors import ConfigError
from distributed_at.plugins import load_plugin
from distributed_at.recipe_nodes import Node


def with_plugins(node: Node, folder: Path) -> Node:
    """Load the plug-ins that a section names, relative to ``folder``, and write down their paths and contents.

    Before anything is merged: which keys of a section stand may be a plug-in's to say.
    """
    plugins = node.child("plugins")
    if plugins is None or not isinstance(plugins.value, list):
        return node
    arch = node.find(("model", "arch")).value
    network = file_of(arch) if isinstance(arch, str) else None
    found = []
    for item in plugins.value:
        told = item.plain()
        given = told if isinstance(told, dict) else {"path": told}
        if not isinstance(given.get("path"), str) or not isinstance(given.get("sha256", ""), str):
            raise ConfigError(f"{item.source}: plugins: expected a Python file, got {told!r}")
        try:
            file = (folder / Path(given["path"]).expanduser()).resolve()
            function = network[1] if network is not None and network[0] == str(file) else None
            path, digest = load_plugin(file, given.get("sha256"), beside=folder, function=function)
        except ConfigError as error:
            raise ConfigError(f"{item.source}: {error}") from None
        found.append(Node({"path": Node(str(path), item.source), "sha256": Node(digest, item.source)}, item.source))
    return Node({**node.value, "plugins": Node(found, plugins.source)}, node.source)


def with_absolute_network(node: Node, folder: Path) -> Node:
    """Write ``model.arch: FILE.py:FUNCTION`` as found from ``folder``, before it is merged into files of other folders."""
    model = node.child("model")
    arch = model.child("arch") if model is not None else None
    if model is None or arch is None:
        return node
    written = absolute_network(arch, folder)
    return Node({**node.value, "model": Node({**model.value, "arch": written}, model.source)}, node.source)


def absolute_network(arch: Node, folder: Path) -> Node:
    """Write ``FILE.py:FUNCTION`` as found from ``folder``; other names stay."""
    found = file_of(arch.value) if isinstance(arch.value, str) else None
    if found is None:
        return arch
    return Node(f"{(folder / Path(found[0]).expanduser()).resolve()}:{found[1]}", arch.source)


def with_network_file(tree: Node) -> Node:
    """Load the file of ``model.arch: FILE.py:FUNCTION`` and write it down among the plug-ins, with its content's hash."""
    arch = tree.find(("model", "arch"))
    found = file_of(arch.value) if isinstance(arch.value, str) else None
    if found is None:
        return tree
    file, function = found
    plugins = tree.child("plugins")
    listed = plugins.value if plugins is not None and isinstance(plugins.value, list) else []
    held = next((item for item in listed if item.plain().get("path") == file), None)
    try:
        if held is None:
            _, digest = load_plugin(Path(file), function=function)
    except ConfigError as error:
        raise ConfigError(f"{arch.source}: model.arch: {error}") from None
    if held is not None:
        return tree
    item = Node({"path": Node(file, arch.source), "sha256": Node(digest, arch.source)}, arch.source)
    return Node({**tree.value, "plugins": Node([*listed, item], arch.source)}, tree.source)
