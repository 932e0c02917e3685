"""Turns what training hands over (numpy, tensors, paths, NaN) into valid JSON, and NaN and infinities back into floats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
LONGEST_TEXT = 20_000  # characters; an event is a row, not a dump
LONGEST_LIST = 10_000


def to_json(value: Any) -> Any:
    """Return ``value`` as plain JSON types; NaN and infinities become the strings of ``NON_FINITE``.

    Arrays and tensors become lists (or one number), unknown objects their ``repr``. A tensor on a device is copied to
    the host here, which waits for it: the caller passes numbers where that matters.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, str):
        return str(value) if len(value) <= LONGEST_TEXT else value[:LONGEST_TEXT] + " …"
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_json(item) for item in list(value)[:LONGEST_LIST]]
    if isinstance(value, PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if hasattr(value, "model_dump"):  # a pydantic section
        return to_json(value.model_dump())
    if hasattr(value, "detach"):  # a tensor
        value = value.detach()
    if hasattr(value, "tolist"):  # tensors, arrays and numpy scalars
        return to_json(value.tolist())
    return to_json(repr(value))


def from_json(value: Any) -> Any:
    """Undo ``to_json`` for non-finite numbers: the three strings of ``NON_FINITE`` become floats again."""
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return value
