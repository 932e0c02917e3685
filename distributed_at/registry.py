"""Names that a recipe may use for one kind of thing, as a dict that a reader can see; plug-ins add to it.

Built-in entries are written where the registry is made, as "module:attribute", and imported when they are first asked
for: so names, and the facts that need no torch, cost no import. Nothing registers itself by being imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar, cast

from distributed_at.errors import ConfigError, did_you_mean

T = TypeVar("T")


def load_attribute(place: str) -> Any:
    """Return what stands at "module:attribute"; the module is imported."""
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Registry(Mapping[str, T], Generic[T]):
    """Name -> object, for one kind of thing.

    Args:
        kind: what an entry is, in a person's words: "objective".
        field: the recipe's field that names one: "objective.name".
        builtin: name -> the object, or "module:attribute" that is imported at first use.
        entry: class of the entries, or that they derive from; what a plug-in adds is checked against it.
        forms: what else may stand there, as messages list it: "LIBRARY:NAME".
    """

    def __init__(
        self,
        kind: str,
        *,
        field: str,
        builtin: Mapping[str, T | str],
        entry: type | str | None = None,
        forms: tuple[str, ...] = (),
    ) -> None:
        self.kind = kind
        self._entry = entry
        self.forms = forms
        self.field = field
        self._builtin = dict(builtin)
        self._added: dict[str, tuple[T, str]] = {}  # of plug-ins, with the file that each comes from

    def __getitem__(self, name: str) -> T:
        """Return the entry called ``name``.

        Raises:
            ConfigError: there is none; the message names the field, what is allowed and the nearest spelling.
        """
        if name in self._added:
            return self._added[name][0]
        if name not in self._builtin:
            raise self.unknown(name)
        entry = self._builtin[name]
        if isinstance(entry, str):
            entry = load_attribute(entry)
            self._builtin[name] = entry
        return cast(T, entry)

    def __iter__(self) -> Iterator[str]:
        yield from self._builtin
        yield from self._added

    def __len__(self) -> int:
        return len(self._builtin) + len(self._added)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._builtin or name in self._added)

    def unknown(self, name: str) -> ConfigError:
        """Return the error for a name that is not here."""
        return ConfigError(
            f"{self.field}: {name!r} is no {self.kind}; allowed are {', '.join([*self, *self.forms])}.{did_you_mean(name, self)}"
        )

    @property
    def builtin(self) -> tuple[str, ...]:
        """Names that ship with the package."""
        return tuple(self._builtin)

    def origin(self, name: str) -> str | None:
        """Return the plug-in that ``name`` comes from, None for a built-in one."""
        return self._added[name][1] if name in self._added else None

    def add(self, name: str, entry: T, *, origin: str) -> None:
        """Add a plug-in's entry, or replace what an earlier state of a plug-in called so.

        Raises:
            ConfigError: a built-in entry has this name, or it is no such entry.
        """
        if name in self._builtin:
            raise ConfigError(f"{origin}: {self.kind} {name!r} exists already in the package; choose another name")
        wanted = load_attribute(self._entry) if isinstance(self._entry, str) else self._entry
        if wanted is not None and not (
            issubclass(entry, wanted) if isinstance(entry, type) else isinstance(entry, wanted)
        ):
            raise ConfigError(f"{origin}: {self.kind} {name!r} must be of {wanted.__qualname__}, got {entry!r}")
        self._added[name] = (entry, origin)

    def remove(self, name: str) -> None:
        """Forget a plug-in's entry."""
        del self._added[name]
