"""Turns what pydantic found wrong with a recipe into one message a person can act on.

Each line names the file and line (or the override), the dotted field, the value, what is allowed and the nearest
right spelling. Nothing here reads files; it sees the tree of ``recipe_nodes`` and the schema of ``config``.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from distributed_at.config import RunConfig
from distributed_at.config.choice import Choice, Section
from distributed_at.errors import ConfigError, did_you_mean, nearest
from distributed_at.recipe_nodes import KeyPath, Node, kind

_SHOWN = 120  # characters of a value that a message quotes
_LINES = 12  # mistakes of one recipe that a message lists
_LIMITS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section (key: value)",
    "model_type": "a section (key: value)",
    "model_attributes_type": "a section (key: value)",
    "dataclass_type": "a section (key: value)",
}


def config_error(error: ValidationError, tree: Node, label: str) -> ConfigError:
    """Build the error for a recipe called ``label`` whose merged ``tree`` failed validation."""
    lines: list[str] = []
    for item in error.errors():
        line = _explain(item, tree)
        if line not in lines:
            lines.append(line)
    if len(lines) == 1:
        return ConfigError(lines[0])
    shown = lines[:_LINES] + ([f"and {len(lines) - _LINES} more"] if len(lines) > _LINES else [])
    return ConfigError(f"{len(lines)} errors in {label}:\n" + "\n".join(f"  {line}" for line in shown))


def unknown_name(what: str, name: str, allowed: Iterable[str], *, where: str = "", listing: str = "") -> ConfigError:
    """Build the error for a recipe, row or table that does not exist."""
    names = sorted(allowed)
    shown = listing or (", ".join(names) if names else "none")
    place = f" in {where}" if where else ""
    return ConfigError(f"no {what} {name!r}{place}.{did_you_mean(name, names)} Allowed: {shown}")


def dotted(path: Iterable[str | int]) -> str:
    """Write a path as recipes and overrides do: ``evaluation.final.1.batch_size``."""
    return ".".join(str(part) for part in path)


def models_at(path: KeyPath) -> list[type[BaseModel]]:
    """Return the schema classes that may stand at ``path``: one, or several where a section's ``name`` chooses."""
    found: list[Any] = [RunConfig]
    for part in path:
        step: list[Any] = []
        for annotation in found:
            if isinstance(part, int) or str(part).isdigit():
                step += _items(annotation)
            elif _is_model(annotation) and part in annotation.model_fields:
                step += _field_parts(annotation.model_fields[part])
        found = step
    return [annotation for annotation in found if _is_model(annotation)]


def chosen_sections() -> dict[str, Section]:
    """Return the sections of a recipe whose class is chosen by their ``name``."""
    return {
        key: mark
        for key, field in RunConfig.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Section)
    }


def field_paths() -> list[str]:
    """Return every dotted field of the schema that can be set, list items left out."""

    def walk(model: type[BaseModel], prefix: str) -> Iterable[str]:
        for name, field in model.model_fields.items():
            yield prefix + name
            for part in _field_parts(field):
                if _is_model(part):
                    yield from walk(part, f"{prefix}{name}.")

    return list(dict.fromkeys(walk(RunConfig, "")))


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _field_parts(field: FieldInfo) -> list[Any]:
    """Return the types that a field's value may have: all classes of a section that its ``name`` chooses."""
    return _parts(Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation)


def _parts(annotation: Any) -> list[Any]:
    """Split unions and ``Annotated`` into the types that they allow; names of a registry become a ``Literal``."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *metadata = get_args(annotation)
        for mark in metadata:
            if isinstance(mark, Section):
                return [*mark.classes().values(), *(part for part in _parts(inner) if part is type(None))]
            if isinstance(mark, Choice):
                return [
                    Literal[(*mark.registry, *mark.registry.forms)],
                    *(part for part in _parts(inner) if part is type(None)),
                ]
        return _parts(inner)
    if origin in (Union, types.UnionType):
        return [part for argument in get_args(annotation) for part in _parts(argument)]
    return [annotation]


def _items(annotation: Any) -> list[Any]:
    """Return the types that a tuple's items may have."""
    if get_origin(annotation) is tuple:
        return [part for argument in get_args(annotation) if argument is not Ellipsis for part in _parts(argument)]
    return []


def _explain(item: Any, tree: Node) -> str:
    """One line for one pydantic error."""
    path: KeyPath = tuple(item["loc"])
    node = tree.find(path)
    name = dotted(path) or "recipe"
    code = item["type"]
    context = item.get("ctx", {})
    if code == "extra_forbidden":
        return f"{node.source}: {_unknown_key(path, node, tree)}"
    if code == "missing":
        parent = tree.find(path[:-1])
        allowed = _describe_field(path)
        return f"{parent.source}: {name}: required, but not given{allowed}"
    if code == "union_tag_not_found":
        tag = context.get("tag", "name")
        return f"{node.source}: {name}.{tag}: required, but not given. Allowed: {', '.join(_tags(context))}"
    if code == "union_tag_invalid":
        tag = context.get("tag", "name")
        at = node.child(tag) or node
        tags = _tags(context)
        return (
            f"{at.source}: {name}.{tag}: {_shown(at)} is not one of the allowed values."
            f"{did_you_mean(str(at.value), tags)} Allowed: {', '.join(tags)}"
        )
    if code == "literal_error":
        values = _literal_values(path)
        return (
            f"{node.source}: {name}: {_shown(node)} is not one of the allowed values."
            f"{did_you_mean(str(node.value), values)} Allowed: {', '.join(values)}"
        )
    if code in _KINDS:
        null = ", or null" if _takes_null(path) else ""
        return f"{node.source}: {name}: expected {_KINDS[code]}{null}, got {_described(node)}"
    if code in _LIMITS:
        key, words = _LIMITS[code]
        return f"{node.source}: {name}: must be {words} {context.get(key):g}, got {_shown(node)}"
    if code in ("too_short", "too_long"):
        wanted = context.get("min_length", context.get("max_length"))
        bound = "at least" if code == "too_short" else "at most"
        return f"{node.source}: {name}: needs {bound} {wanted} entries, got {context.get('actual_length')}"
    if code == "string_pattern_mismatch":
        return (
            f"{node.source}: {name}: {_shown(node)} is not allowed; use letters, digits and . _ + = -, "
            "beginning with a letter or digit"
        )
    if code == "string_too_long":
        return (
            f"{node.source}: {name}: at most {context.get('max_length')} characters (it names the run's folder), "
            f"got {len(str(node.value))}: {_shown(node)}"
        )
    if code == "string_too_short":
        return f"{node.source}: {name}: must not be empty"
    message = item["msg"].removeprefix("Value error, ")
    return f"{_named_in(message, path, node, tree)}: {f'{name}: ' if path else ''}{message}"


def _unknown_key(path: KeyPath, node: Node, tree: Node) -> str:
    """Explain a key that the schema does not have, with the nearest one here or elsewhere."""
    key = str(path[-1])
    parent = dotted(path[:-1])
    models = models_at(path[:-1])
    if len(models) > 1:
        tag = _tag_at(path[:-1])
        chosen = tree.find((*path[:-1], tag)).value
        models = [model for model in models if model.model_fields[tag].default == chosen] or models
    allowed = sorted({name for model in models for name in model.model_fields})
    suggestion = nearest(key, allowed)
    if suggestion:
        hint = f" Did you mean {dotted((*path[:-1], suggestion))!r}?"
    else:
        paths = field_paths()
        same_leaf = [known for known in paths if known.rsplit(".", 1)[-1] == key]
        hint = (
            f" Did you mean {', '.join(map(repr, same_leaf[:3]))}?" if same_leaf else did_you_mean(dotted(path), paths)
        )
    value = "" if isinstance(node.value, dict) else f" (value {_shown(node)})"
    return f"{dotted(path)}: unknown key {key!r}{f' in {parent}' if parent else ''}{value}.{hint} Allowed: {', '.join(allowed)}"


def _shown(node: Node) -> str:
    """Write a value as a message shows it, cut where it is long."""
    value = node.plain()
    text = repr(value) if isinstance(value, (str, list, dict)) else str(value).replace("None", "null")
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _described(node: Node) -> str:
    """Say what was found: ``the text 'abc'``, ``the number 1.5``, ``null``."""
    if node.value is None:
        return "null"
    if isinstance(node.value, bool):
        return str(node.value).lower()
    if isinstance(node.value, dict):
        return f"a section with {', '.join(node.value) or 'nothing in it'}"
    return f"the {kind(node.value)} {_shown(node)}"


def _field(path: KeyPath) -> Any:
    """Return the pydantic field at ``path``, or None for list items and unknown paths."""
    for model in models_at(path[:-1]):
        if path and path[-1] in model.model_fields:
            return model.model_fields[str(path[-1])]
    return None


def _tag_at(path: KeyPath) -> str:
    """Return the field that chooses the class of the section at ``path``."""
    item = bool(path) and (isinstance(path[-1], int) or str(path[-1]).isdigit())
    field = _field(path[:-1] if item else path)
    annotations = [] if field is None else get_args(field.annotation) if item else [Annotated[(Any, *field.metadata)]]
    marks = [mark for annotation in annotations for mark in getattr(annotation, "__metadata__", ())]
    return next((mark.tag for mark in marks if isinstance(mark, Section)), "name")


def _takes_null(path: KeyPath) -> bool:
    field = _field(path)
    return field is not None and type(None) in _field_parts(field)


def _literal_values(path: KeyPath) -> list[str]:
    field = _field(path)
    parts = _field_parts(field) if field is not None else []
    values = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    return [str(value) for value in values] + (["null"] if type(None) in parts else [])


def _describe_field(path: KeyPath) -> str:
    values = _literal_values(path)
    if values:
        return f". Allowed: {', '.join(values)}"
    field = _field(path)
    return f" ({field.description})" if field is not None and field.description else ""


def _tags(context: dict[str, Any]) -> list[str]:
    return [tag.strip("' ") for tag in str(context["expected_tags"]).split(",")]


def _named_in(message: str, path: KeyPath, node: Node, tree: Node) -> str:
    """Find the line of a field that a cross-field message names, an override's first; else the section's own."""
    named: list[str] = []
    for word in re.findall(r"[A-Za-z_][\w.]*\w", message):
        parts = tuple(word.split("."))
        for full in (path + parts, parts):
            found = tree
            for part in full:
                child = found.child(part)
                if child is None:
                    break
                found = child
            else:
                if not isinstance(found.value, dict):
                    named.append(str(found.source))
    return next((source for source in named if source.startswith("override ")), next(iter(named), str(node.source)))
