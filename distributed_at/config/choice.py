"""Fields of the schema whose values are names in a registry, so that a plug-in's names are as good as ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from distributed_at.registry import Registry


@dataclass(frozen=True)
class Choice:
    """Annotates a ``str`` field: ``norm: Annotated[str, Choice(NORMS)]``; the value must be a name of the registry."""

    registry: Registry[Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value not in self.registry:
            raise not_registered(self.registry, value)
        return value


@dataclass(frozen=True)
class Section:
    """Annotates a section whose class depends on its ``name``: ``objective: Annotated[Base, Section(OBJECTIVES)]``.

    An entry of the registry has the section's class as its attribute ``Config``; ``tag`` is the field that chooses. A
    class may have ``earlier_spelling``, which turns a section as earlier versions wrote it into today's.
    """

    registry: Registry[Any]
    tag: str = "name"
    default: str | None = None  # name of a section that gives none

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(
            self._parse,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda section, info: section.model_dump(mode=info.mode, exclude_defaults=info.exclude_defaults),
                info_arg=True,
            ),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [config.model_json_schema() for config in self.classes().values()]}

    def classes(self) -> dict[str, type[BaseModel]]:
        """Return the section's class by name."""
        return {name: self.registry[name].Config for name in self.registry}

    def _parse(self, value: Any, info: ValidationInfo) -> BaseModel:
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("dict_type", "Input should be a section")
        name = value.get(self.tag, self.default)
        if name is None:
            raise PydanticCustomError(
                "union_tag_not_found",
                f"{self.tag} is required",
                {"expected_tags": ", ".join(map(repr, self.registry)), "tag": self.tag},
            )
        if name not in self.registry:
            raise not_registered(self.registry, name, code="union_tag_invalid", tag=self.tag)
        config: type[BaseModel] = self.registry[name].Config
        value = config.earlier_spelling(value) if hasattr(config, "earlier_spelling") else value
        # the inner ValidationError keeps its places, to which pydantic adds this section's
        if info.mode == "json":
            return config.model_validate_json(json.dumps(value))
        return config.model_validate(value)


def read_by_some(registry: Registry[Any]) -> frozenset[str]:
    """Return the fields of a section that some entries read and others do not, as the entries' ``fields`` say."""
    return frozenset(field for name in registry.builtin for field in registry[name].fields)


def unread(registry: Registry[Any], name: str) -> frozenset[str]:
    """Return the fields of a section that the entry ``name`` does not read."""
    own = registry[name].fields
    return frozenset() if own is None else read_by_some(registry) - set(own)


def refuse_unread(section: BaseModel, name: str, registry: Registry[Any]) -> None:
    """Raise a ValueError where a section gives a value to a field that its entry ``name`` does not read."""
    for field in sorted(unread(registry, name)):
        if getattr(section, field) != type(section).model_fields[field].get_default(call_default_factory=True):
            readers = [other for other in registry.builtin if field in registry[other].fields]
            raise ValueError(
                f"{field} is read by {registry.kind} {', '.join(readers)} alone, and this one is '{name}': remove {field}"
            )


def not_registered(
    registry: Registry[Any], value: Any, *, code: str = "literal_error", tag: str = "name"
) -> PydanticCustomError:
    """Return pydantic's error for a value that is no name of the registry, in the form of its own errors."""
    tags = ", ".join(map(repr, registry))
    return PydanticCustomError(code, f"not a {registry.kind}", {"expected_tags": tags, "tag": tag})
