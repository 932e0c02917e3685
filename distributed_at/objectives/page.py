"""Writes docs/objectives.md from the objectives themselves, so that the page cannot drift from what they do.

Run ``python -m distributed_at.objectives.page`` in a checkout after changing one.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from distributed_at.objectives import OBJECTIVES, Objective

_HEAD = """# Objectives

What one training step minimises. Each is one file in `distributed_at/objectives/`, chosen by `objective.name`; this page
is written from those files by `python -m distributed_at.objectives.page`. How to add one: [CONTRIBUTING.md](../CONTRIBUTING.md).
"""
_ATTACKS = {"none": "none", "given": "those of the recipe's attack", "own": "its own"}


def objectives_page() -> str:
    """Return the page in Markdown."""
    return "\n".join([_HEAD, *(_entry(name, OBJECTIVES[name]) for name in OBJECTIVES.builtin)])


def _entry(name: str, objective: type[Objective]) -> str:
    about = (inspect.getmodule(objective).__doc__ or "").strip()
    rows = [
        f"| `{field}` | {_default(info)} | {_values(info)} | {info.description or ''} |"
        for field, info in _own(objective)
    ]
    return "\n".join(
        [
            f"## `{name}`: {objective.title}\n",
            f"{about}\n",
            f"{_markdown(objective.__doc__)}\n",
            f"Source: {objective.source}.\n",
            _facts(name, objective),
            "| field | default | values | meaning |\n| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _facts(name: str, objective: type[Objective]) -> str:
    if any(info.is_required() for _, info in _own(objective)):
        return ""
    section = objective.Config(name=name)
    trained = " + ".join(f"{count:g} {branch}" for branch, count in objective.passes(section).trained.items())
    return (
        f"By default it trains on {' and '.join(objective.trains(section))} images; passes with a backward an image: "
        f"{trained}; adversarial images: {_ATTACKS[objective.needs(section).attack]}.\n"
    )


def _own(objective: type[Objective]) -> list[tuple[str, FieldInfo]]:
    return [(name, info) for name, info in objective.Config.model_fields.items() if name != "name"]


def _default(info: FieldInfo) -> str:
    return "required" if info.is_required() else f"`{info.default}`"


def _values(info: FieldInfo) -> str:
    annotation: Any = info.annotation
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [f"{sign} {getattr(m, key):g}" for m in info.metadata for key, sign in signs.items() if hasattr(m, key)]
    return ", ".join([getattr(annotation, "__name__", str(annotation)), *limits])


def _markdown(docstring: str | None) -> str:
    return inspect.cleandoc(docstring or "").replace("``", "`")


if __name__ == "__main__":
    path = Path(__file__).parents[2] / "docs" / "objectives.md"
    path.write_text(objectives_page(), encoding="utf-8")
    print(f"wrote {path}")
