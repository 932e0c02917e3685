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

An objective declares what it needs, and the step gives it that (`distributed_at/objectives/base.py`):

| it wants | it gives |
| --- | --- |
| no attack, the recipe's, or to make its own images within the recipe's ball | `needs`: `attack: none, given, own` |
| soft targets, or other images than the data's, for attack and loss | `prepare(batch)` |
| weights changed around a loss and its backward, restored bitwise | `around(...)`, with `perturbed` |
| something between backward and the optimiser's step | `before_step(...)`; to see the weights' gradients, `needs`: `gradients` (ZeRO stage 0) |
| a batch for m steps in a row | `needs`: `repeats`; each is an optimiser step, and an epoch has m times as many |
| a frozen teacher, a companion, a source of transfer | `networks()`; for attacks, their `views` |
| numbers that the next step needs; a row for each place of the batch | `needs`: `state`; `state_dict()`, `place_tensors()` |
| the trained network in the attack's BN mode, for gradients to images | `needs`: `itself`; `views["itself"]` |
| whole BN groups on one rank | `needs`: `whole_groups` |

All of it is saved and resumed bitwise. `Batch` says where an image comes from (`origin`), which use of the batch a step is
(`repeat`) and where its rows lie (`place`).
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
    passes = objective.passes(section)
    trained = " + ".join(f"{count:g} {branch}" for branch, count in passes.trained.items())
    return (
        f"By default it trains on {' and '.join(objective.trains(section))} images; passes with a backward an image: "
        f"{trained}; adversarial images: {_ATTACKS[objective.needs(section).attack]}; "
        f"BN's running statistics see {' then '.join(passes.moving) or 'none'}.\n"
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
