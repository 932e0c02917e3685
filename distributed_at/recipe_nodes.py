"""Recipe text as a tree that remembers where every value was written; knows YAML and merging, not the schema.

The dialect is YAML 1.2's core: ``1e-4`` is a number, ``on`` and ``off`` are words, a key given twice is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distributed_at.errors import ConfigError

_MOST_VALUES = 20_000  # of one file, every use of an alias counted: fifty times the longest recipe
_DEEPEST = 40
_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))
KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Source:
    """Where a value was written: a file and line (from 1), or an override on the command line."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Node:
    """A value with its source: a dict of nodes, a list of nodes, or a scalar."""

    value: Any
    source: Source

    def plain(self) -> Any:
        """Return the tree as dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def find(self, path: KeyPath) -> Node:
        """Return the node at ``path``, or the deepest one on the way that exists."""
        node = self
        for key in path:
            child = node.child(key)
            if child is None:
                return node
            node = child
        return node

    def child(self, key: str | int) -> Node | None:
        """Return the value under a key of a section or an index of a list, or None."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and 0 <= key < len(self.value):
            return self.value[key]
        return None

    def items(self) -> Iterator[tuple[str, Node]]:
        """Iterate over a section's keys; nothing for other nodes."""
        yield from self.value.items() if isinstance(self.value, dict) else ()


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 core scalars in place of 1.1's (no yes/no/on/off, dates, sexagesimals)."""


class _CoreDumper(yaml.SafeDumper):
    """SafeDumper that quotes a string whenever YAML 1.1 or 1.2 would read it as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCALARS = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)
_CoreLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in _SCALARS:
    _CoreLoader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    _CoreDumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)
_CoreLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(node.value)))
_CoreDumper.add_representer(
    list,
    lambda dumper, data: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", data, flow_style=not any(isinstance(item, (dict, list)) for item in data)
    ),
)


def parse_file(path: Path, label: str) -> Node:
    """Read a YAML file into nodes whose sources say ``label:line``.

    Raises:
        ConfigError: not YAML, not a mapping, a key given twice, a number that is not finite.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{label}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return parse_text(text, label)


def parse_text(text: str, label: str) -> Node:
    """Like :func:`parse_file` for text at hand."""
    root = _compose(text, label)
    if root is None:
        raise ConfigError(f"{label}: the file is empty; a recipe is a mapping of sections (data, model, train, ...)")
    node = _convert(root, label, None)
    if not isinstance(node.value, dict):
        raise ConfigError(
            f"{node.source}: a recipe is a mapping of sections (data, model, train, ...), not a {kind(node.value)}"
        )
    return node


def parse_override_value(text: str, source: Source) -> Node:
    """Read the right-hand side of ``key=value`` as YAML; every node inside carries ``source``."""
    root = _compose(text, str(source))
    return Node(None, source) if root is None else _convert(root, str(source), source)


def dump(data: Any) -> str:
    """Write plain data as YAML that :func:`parse_text` reads back identically."""
    return yaml.dump(data, Dumper=_CoreDumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120)


def kind(value: Any) -> str:
    """Name a value's kind the way a person would."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, str):
        return "text"
    return {"dict": "section"}.get(type(value).__name__, type(value).__name__)


def _compose(text: str, label: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{label}:{mark.line + 1}" if mark else label
        raise ConfigError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{label}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{label}: nested more than {_DEEPEST} deep") from None


def _convert(node: yaml.Node, label: str, fixed: Source | None) -> Node:
    """Turn YAML's nodes into ours. An alias repeats what it stands for, so what it may grow to is limited."""
    return _converted(node, label, fixed, [_MOST_VALUES], 0)


def _converted(node: yaml.Node, label: str, fixed: Source | None, left: list[int], depth: int) -> Node:
    def source_of(part: yaml.Node) -> Source:
        return fixed or Source(label, part.start_mark.line + 1)

    here = source_of(node)
    left[0] -= 1
    if left[0] < 0:
        raise ConfigError(f"{here}: more than {_MOST_VALUES} values, each use of an alias (*name) counted")
    if depth > _DEEPEST:
        raise ConfigError(f"{here}: nested more than {_DEEPEST} deep; does an anchor (&name) hold itself?")
    if node.tag not in _TAGS:
        raise ConfigError(f"{here}: tag {node.tag!r} is not allowed in a recipe")
    if isinstance(node, yaml.MappingNode):
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            at = source_of(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{at}: a key must be a word")
            key = key_node.value
            if key == "<<":
                raise ConfigError(f"{at}: YAML merge keys ('<<') are not used in recipes; use extends:")
            if key in children:
                raise ConfigError(f"{at}: key {key!r} is given twice (first in line {children[key].source.line})")
            children[key] = Node(_converted(value_node, label, fixed, left, depth + 1).value, at)
        return Node(children, here)
    if isinstance(node, yaml.SequenceNode):
        return Node([_converted(item, label, fixed, left, depth + 1) for item in node.value], here)
    try:
        value = _CoreLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{here}: cannot read {node.value!r}: {error}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{here}: {node.value} is not a finite number")
    return Node(value, here)


def expand_dotted(node: Node) -> Node:
    """Turn dotted keys at the top of a section (``optimizer.lr: 0.1``) into nested sections.

    Raises:
        ConfigError: the same field is given both ways.
    """
    result = Node({}, node.source)
    for key, child in node.items():
        path = key.split(".")
        if "" in path:
            raise ConfigError(f"{child.source}: key {key!r} has an empty part")
        _insert(result, path, child)
    return result


def _insert(root: Node, path: list[str], leaf: Node) -> None:
    for part in path[:-1]:
        existing = root.value.get(part)
        if existing is not None and not isinstance(existing.value, dict):
            raise ConfigError(
                f"{leaf.source}: {'.'.join(path)} is given, but {part!r} already has a value in line {existing.source.line}"
            )
        root = root.value.setdefault(part, Node({}, leaf.source))
    existing = root.value.get(path[-1])
    if existing is None:
        root.value[path[-1]] = Node(dict(leaf.value), leaf.source) if isinstance(leaf.value, dict) else leaf
    elif isinstance(existing.value, dict) and isinstance(leaf.value, dict):
        for key, child in leaf.items():
            _insert(existing, [key], child)
    else:
        raise ConfigError(f"{leaf.source}: {'.'.join(path)} is given twice (first in line {existing.source.line})")


def merge(base: Node, over: Node) -> Node:
    """Lay ``over`` upon ``base``: sections merge key by key, everything else (lists, null) replaces."""
    if not (isinstance(base.value, dict) and isinstance(over.value, dict)):
        return over
    merged = dict(base.value)
    for key, child in over.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, base.source)


def replace_at(root: Node, path: KeyPath, leaf: Node) -> Node:
    """Return ``root`` with ``leaf`` laid upon the value at ``path``; sections on the way are made where absent."""
    if not path:
        return merge(root, leaf)
    key, rest = path[0], path[1:]
    if isinstance(root.value, list) and isinstance(key, int) and 0 <= key < len(root.value):
        items = list(root.value)
        items[key] = replace_at(items[key], rest, leaf)
        return Node(items, root.source)
    children = dict(root.value) if isinstance(root.value, dict) else {}
    children[str(key)] = replace_at(children.get(str(key), Node({}, leaf.source)), rest, leaf)
    return Node(children, root.source)


def without(node: Node, key: str) -> Node:
    """Return a section without one of its keys."""
    return Node({name: child for name, child in node.items() if name != key}, node.source)
