"""Finds recipes and rows of paper tables, applies overrides, validates, prints and compares; runs nothing.

A *recipe* is a YAML file of the schema in ``config.py``, optionally with ``extends:``. A *table file* has ``base:``
and ``rows:`` and is addressed ``FILE#row``. Files whose name begins with ``_`` are parts for ``extends:`` alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distributed_at.config import PaperConfig, RunConfig
from distributed_at.errors import ConfigError, did_you_mean
from distributed_at.plugins import load_installed
from distributed_at.recipe_code import absolute_network, with_absolute_network, with_network_file, with_plugins
from distributed_at.recipe_errors import config_error, unknown_name
from distributed_at.recipe_nodes import (
    Node,
    Source,
    dump,
    expand_dotted,
    merge,
    parse_file,
    parse_override_value,
    replace_at,
    without,
)
from distributed_at.recipe_sections import lay, switch_network, switch_section

FOLDERS = ("digits", "cifar", "imagenet")
_SHOWN = 80  # characters of a name that a message quotes
_TABLE_KEYS = ("title", "base", "rows", "paper")


@dataclass(frozen=True, kw_only=True)
class ResolvedRecipe:
    """A recipe after ``extends:``, rows and overrides.

    Attributes:
        config: the validated run.
        ref: the reference it was asked for by.
        files: every file read, in order.
        overrides: the overrides applied.
    """

    config: RunConfig
    ref: str
    files: tuple[Path, ...]
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RecipeEntry:
    """One line of ``distributed-at recipes``: a runnable reference, the paper's numbers, and the run itself."""

    ref: str
    paper: PaperConfig | None
    description: str
    config: RunConfig


def recipe_root() -> Path:
    """Return the folder that holds cifar/, imagenet/ and digits/: the checkout, else the installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and all((checkout / folder).is_dir() for folder in FOLDERS):
        return checkout
    return package / "_recipes"


def recipe_files(root: Path | None = None) -> list[Path]:
    """Return every recipe and table file, sorted; parts (``_name.yaml``) are left out."""
    root = root or recipe_root()
    found = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.yaml"))]
    return [path for path in found if not path.name.startswith("_")]


def load_recipe(ref: str, overrides: Sequence[str] = ()) -> ResolvedRecipe:
    """Resolve ``FILE``, ``FILE#row`` or a name below the recipe folders, with ``key=value`` overrides.

    ``init=RUN`` is short for ``train.init_from=RUN`` with the model and data of that run; later overrides win over them.

    Raises:
        ConfigError: anything wrong, naming file and line, field, value, what is allowed and the nearest spelling.
    """
    files: list[Path] = []
    load_installed()
    tree = _resolve(ref, near=None, files=files, chain=())
    for text in overrides:
        if text.partition("=")[0].strip() == "init":
            tree = _begin_from(tree, text)
    tree = _apply_overrides(tree, [text for text in overrides if text.partition("=")[0].strip() != "init"])
    tree = with_network_file(without(tree, "extends"))
    return ResolvedRecipe(config=_validate(tree, ref), ref=ref, files=tuple(files), overrides=tuple(overrides))


def list_recipes(root: Path | None = None) -> list[RecipeEntry]:
    """Return every runnable recipe and row, in the order of folders, files and rows."""
    root = root or recipe_root()
    entries = []
    for path in recipe_files(root):
        name = path.relative_to(root).as_posix()
        for ref in (f"{name}#{row}" for row in rows_of(path)) if is_table(path) else (name,):
            config = load_recipe(str(root / ref)).config
            entries.append(RecipeEntry(ref=ref, paper=config.paper, description=config.description, config=config))
    return entries


def group_by_table(entries: Iterable[RecipeEntry]) -> dict[tuple[str, str], list[RecipeEntry]]:
    """Group entries by (paper title, table), in order of first appearance; recipes of no paper come under ('', '')."""
    groups: dict[tuple[str, str], list[RecipeEntry]] = {}
    for entry in entries:
        key = (entry.paper.title, entry.paper.table) if entry.paper else ("", "")
        groups.setdefault(key, []).append(entry)
    return groups


def is_table(path: Path) -> bool:
    """Return whether a file is a table of rows."""
    return "rows" in _parse(path).value


def rows_of(path: Path) -> list[str]:
    """Return the row names of a table file, as written; an empty list for a plain recipe."""
    rows = _parse(path).child("rows")
    return [] if rows is None else [name for name, _ in rows.items()]


def dump_yaml(config: RunConfig) -> str:
    """Write the whole run, defaults included; loading it gives the identical config."""
    return dump(config.model_dump(mode="json"))


def recipe_hash(config: RunConfig) -> str:
    """Return 16 hex digits over everything that the recipe says."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Turn nested sections into ``{dotted field: value}``; lists are cut into their items."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, child in items:
        flat |= flatten(child, f"{prefix}.{key}" if prefix else str(key))
    return flat


def diff(before: RunConfig, after: RunConfig) -> list[str]:
    """Return one readable line a differing field: ``optimizer.lr: 0.1 -> 0.2``; empty for equal runs."""
    left, right = (flatten(config.model_dump(mode="json")) for config in (before, after))
    lines = []
    for key in sorted({*left, *right}):
        old, new = (json.dumps(side[key]) if key in side else "(absent)" for side in (left, right))
        if old != new:
            lines.append(f"{key}: {old} -> {new}")
    return lines


def _parse(path: Path) -> Node:
    """Parse a file once per modification; the label is the shortest path that finds it again."""
    stat = path.stat()
    return _parse_cached(path, _label(path), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=512)
def _parse_cached(path: Path, label: str, mtime: int, size: int) -> Node:
    return parse_file(path, label)


def _label(path: Path) -> str:
    for root in (Path.cwd(), recipe_root()):
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return str(path)


def _locate(ref: str, near: Path | None, at: Source | None) -> Path:
    """Find a file: relative to the file that names it, then to the working directory, then to the recipe folders."""
    places = [near] if near is not None else []
    places += [Path.cwd(), recipe_root()]
    for place in places:
        for name in (ref, f"{ref}.yaml", f"{ref}.yml"):
            try:
                path = (place / name).resolve()
                if path.is_file():
                    return path
                if path.is_dir() and (path / "recipe.yaml").is_file():
                    return path / "recipe.yaml"
            except (OSError, ValueError):  # too long, or with a null byte: no file has such a name
                continue
    root = recipe_root()
    known = [path.relative_to(root).as_posix() for path in recipe_files(root)]
    where = f"{at}: extends: " if at else ""
    beside = _files_beside(ref, near or Path.cwd())
    names = [*beside, *known]
    guess = did_you_mean(ref, names) or did_you_mean(f"{ref}.yaml", names)
    listed = f"; here: {', '.join(beside[:8])}" if beside else ""
    raise ConfigError(
        f"{where}no recipe {ref[:_SHOWN]!r}.{guess} Allowed: a YAML file{listed}, a run folder, or one of: "
        f"{', '.join(known) or 'none'}"
    )


def _files_beside(ref: str, folder: Path) -> list[str]:
    """Return the YAML files of the folder that ``ref`` points into, written as ``ref`` is."""
    parent = Path(ref).parent
    try:
        return sorted((parent / path.name).as_posix() for path in (folder / parent).glob("*.y*ml"))
    except OSError:  # a name that no folder can have
        return []


def _resolve(ref: str, near: Path | None, files: list[Path], chain: tuple[str, ...], at: Source | None = None) -> Node:
    """Read ``ref`` with everything that it extends; ``chain`` holds what is being read, to name cycles."""
    name, _, row = ref.partition("#")
    path = near if not name and near is not None and near.is_file() else _locate(name, _folder(near), at)
    key = f"{_label(path)}#{row}" if row else _label(path)
    if key in chain:
        cycle = " -> ".join([*chain[chain.index(key) :], key])
        raise ConfigError(f"{at}: extends goes round in a circle: {cycle}")
    if path not in files:
        files.append(path)
    node = _parse(path)
    if "rows" in node.value:
        return _table_row(node, path, row, files, (*chain, key))
    if row:
        raise ConfigError(
            f"{_label(path)} is a recipe, not a table: it has no rows, so {ref!r} names nothing; use {name!r}"
        )
    return _extend(expand_dotted(node), path, files, (*chain, key))


def _folder(near: Path | None) -> Path | None:
    return near.parent if near is not None else None


def _extend(node: Node, path: Path, files: list[Path], chain: tuple[str, ...]) -> Node:
    """Lay a section tree upon what its ``extends:`` names (a reference, or a list of which later ones win)."""
    node = with_absolute_network(with_plugins(node, path.parent), path.parent)
    extends = node.child("extends")
    if extends is None:
        return node
    refs = [Node(extends.value, extends.source)] if isinstance(extends.value, str) else extends.value
    if not isinstance(refs, list) or not all(isinstance(ref.value, str) for ref in refs):
        raise ConfigError(f"{extends.source}: extends: expected a reference or a list of them, got {extends.plain()!r}")
    base = Node({}, node.source)
    for ref in refs:
        base = lay(base, _resolve(ref.value, path, files, chain, ref.source))
    return lay(base, without(node, "extends"))


def _table_row(node: Node, path: Path, row: str, files: list[Path], chain: tuple[str, ...]) -> Node:
    """Resolve one row of a table file: base, then the row; the run is named ``<file>-<row>``."""
    rows, names = node.value["rows"], rows_of(path)
    for key, child in node.items():
        if key not in _TABLE_KEYS:
            raise ConfigError(
                f"{child.source}: unknown key {key!r} in a table file.{did_you_mean(key, _TABLE_KEYS)} "
                f"Allowed: {', '.join(_TABLE_KEYS)}"
            )
    if not isinstance(rows.value, dict) or not names:
        raise ConfigError(f"{rows.source}: rows: expected a section of named rows")
    label = _label(path)
    if not row:
        raise ConfigError(f"{label} is a table; choose a row, e.g. {label}#{names[0]}. Rows: {', '.join(names)}")
    if row not in names:
        raise unknown_name("row", row, names, where=label, listing=", ".join(names))
    chosen = rows.value[row]
    if not isinstance(chosen.value, dict):
        raise ConfigError(f"{chosen.source}: rows.{row}: expected a section, got {chosen.plain()!r}")
    base = node.child("base")
    tree = Node({}, chosen.source)
    if base is not None:
        section = Node({"extends": base}, base.source) if not isinstance(base.value, dict) else base
        tree = _extend(expand_dotted(section), path, files, chain)
    # The base's paper entry belongs to the base; a row starts from the table's.
    tree = without(tree, "paper")
    paper = node.child("paper")
    if paper is not None:
        tree = lay(tree, Node({"paper": paper}, paper.source))
    tree = lay(tree, Node({"name": Node(f"{path.stem}-{row}", chosen.source)}, chosen.source))
    own = with_absolute_network(with_plugins(expand_dotted(chosen), path.parent), path.parent)
    if own.child("extends") is not None:
        inherited = without(
            without(_extend(Node({"extends": own.value["extends"]}, own.source), path, files, chain), "name"), "paper"
        )
        tree = lay(tree, inherited)
    return lay(tree, _numbers(without(own, "extends")))


def _numbers(row: Node) -> Node:
    """Let a row write ``paper: {clean: 85.87, aa: 46.43}``: what is no field of the paper's entry is a number."""
    paper = row.child("paper")
    if paper is None or not isinstance(paper.value, dict):
        return row
    fields: dict[str, Node] = {}
    numbers: dict[str, Node] = {}
    for key, child in paper.items():
        known = key in PaperConfig.model_fields
        is_number = isinstance(child.value, (int, float)) and not isinstance(child.value, bool)
        (numbers if not known and is_number else fields)[key] = child
    if numbers:
        given = fields.get("numbers", Node({}, paper.source))
        fields["numbers"] = merge(Node(numbers, paper.source), given)
    return Node({**row.value, "paper": Node(fields, paper.source)}, row.source)


def _begin_from(tree: Node, text: str) -> Node:
    """Apply ``init=RUN``: that run's network and data, and its weights to begin with; a weights file has no recipe."""
    source, value = Source(f"override {text!r}"), text.partition("=")[2].strip()
    path = next((p for p in (Path(value).expanduser(), Path("runs") / value) if value and p.exists()), None)
    if path is None:
        raise ConfigError(f"{source}: there is no {value!r}, nor runs/{value}: give a run folder or a weights file")
    path = path.resolve()
    if (path / "recipe.yaml").is_file():
        # the run's plug-ins with it, as they were: its network or data may be theirs
        held = with_plugins(_parse(path / "recipe.yaml"), path)
        taken = {key: held.value[key] for key in ("model", "data") if key in held.value}
        tree = Node({**tree.value, **taken, "plugins": _united(tree, held)}, tree.source)
    return replace_at(tree, ("train", "init_from"), Node(str(path), source))


def _united(tree: Node, held: Node) -> Node:
    """Return the plug-ins of both, each file once."""
    found = {
        item.plain()["path"]: item
        for node in (held.child("plugins"), tree.child("plugins"))
        if node is not None and isinstance(node.value, list)
        for item in node.value
    }
    return Node(list(found.values()), held.source)


def _apply_overrides(tree: Node, overrides: Sequence[str]) -> Node:
    """Apply ``key=value`` in order; the value is YAML, so numbers, lists, null and {a: 1} all work."""
    parsed = []
    for text in overrides:
        key, equals, value = text.partition("=")
        source = Source(f"override {text!r}")
        key = key.strip()
        if not equals or not key or "" in key.split("."):
            raise ConfigError(f"{source}: an override is written key=value, e.g. optimizer.lr=0.2")
        path = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        node = parse_override_value(value, source)
        if path == ("model", "arch"):
            node = absolute_network(node, Path.cwd())
        elif path == ("model",):
            node = with_absolute_network(Node({"model": node}, source), Path.cwd()).value["model"]
        if path == ("plugins",):
            node = with_plugins(Node({"plugins": node}, source), Path.cwd()).value["plugins"]
        parsed.append((path, node))
    for path, node in parsed:
        key = str(path[0])
        name = node if path == (key, "name") else node.child("name") if path == (key,) else None
        tree = switch_section(tree, key, name)
        arch = node if path == ("model", "arch") else node.child("arch") if path == ("model",) else None
        tree = switch_network(tree, arch)
    for path, node in parsed:
        tree = replace_at(tree, path, node)
    return tree


def _validate(tree: Node, label: str) -> RunConfig:
    try:
        return RunConfig.model_validate_json(json.dumps(tree.plain()))
    except ValidationError as error:
        raise config_error(error, tree, label) from None
