"""A registry is a dict that can be read; names, mistakes and plug-ins' entries."""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated, Any

import pytest
from pydantic import ValidationError

from distributed_at.config.base import Strict
from distributed_at.config.choice import Choice, Section
from distributed_at.errors import ConfigError
from distributed_at.registry import Registry


class Anchor:
    class Config(Strict):
        name: str = "anchor"
        weights: tuple[int, ...] = (1,)


class Buoy:
    class Config(Strict):
        name: str = "buoy"
        colour: str = "red"


def registry(**builtin: Any) -> Registry[Any]:
    return Registry("thing", field="thing.name", builtin=builtin or {"anchor": Anchor, "buoy": Buoy})


def test_entry_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys; from distributed_at.registry import Registry\n"
        "r = Registry('decoder', field='x', builtin={'a': 'colorsys:rgb_to_hsv'})\n"
        "assert list(r) == ['a'] and 'a' in r and 'colorsys' not in sys.modules\n"
        "assert r['a'](0, 0, 0) == (0.0, 0.0, 0) and 'colorsys' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_told_with_field_and_nearest_spelling() -> None:
    with pytest.raises(
        ConfigError, match=r"thing.name: 'ancho' is no thing; allowed are anchor, buoy. Did you mean 'anchor'"
    ):
        registry()["ancho"]


def test_plugin_adds_replaces_its_own_and_never_a_builtin() -> None:
    things = registry()
    things.add("raft", 1, origin="mine.py")
    things.add("raft", 2, origin="mine.py")
    assert (things["raft"], things.origin("raft"), things.origin("buoy")) == (2, "mine.py", None)
    assert list(things) == ["anchor", "buoy", "raft"]
    assert things.builtin == ("anchor", "buoy")
    with pytest.raises(ConfigError, match=r"mine.py: thing 'buoy' exists already"):
        things.add("buoy", 3, origin="mine.py")
    things.remove("raft")
    assert "raft" not in things


def test_section_is_parsed_by_its_name_and_keeps_the_place_of_a_mistake() -> None:
    things = registry()

    class Recipe(Strict):
        thing: Annotated[Any, Section(things)]

    parsed = Recipe.model_validate_json('{"thing": {"name": "anchor", "weights": [1, 2]}}')
    assert parsed.thing == Anchor.Config(weights=(1, 2))
    assert Recipe.model_validate_json(parsed.model_dump_json()) == parsed
    for text, place, code in (
        ('{"thing": {"name": "anchor", "weights": [1, "x"]}}', ("thing", "weights", 1), "int_type"),
        ('{"thing": {"name": "buoy", "weights": [1]}}', ("thing", "weights"), "extra_forbidden"),
        ('{"thing": {"name": "boy"}}', ("thing",), "union_tag_invalid"),
        ('{"thing": {}}', ("thing",), "union_tag_not_found"),
        ('{"thing": 3}', ("thing",), "dict_type"),
    ):
        with pytest.raises(ValidationError) as caught:
            Recipe.model_validate_json(text)
        (error,) = caught.value.errors()
        assert (error["loc"], error["type"]) == (place, code)


def test_choice_takes_names_that_plugins_add() -> None:
    things = registry()

    class Recipe(Strict):
        thing: Annotated[str, Choice(things)] = "buoy"

    with pytest.raises(ValidationError, match="not a thing"):
        Recipe(thing="raft")
    things.add("raft", 1, origin="mine.py")
    assert Recipe(thing="raft").thing == "raft"
