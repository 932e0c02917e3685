"""Which values a recipe can name in the sections that decide what a step computes, and which of them no case trains with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distributed_at.config import RunConfig
from distributed_at.config.choice import Choice
from distributed_at.objectives import OBJECTIVES
from tests.reference.cases import CASES

# Of the network what normalises and what recomputes; layers and blocks have references of their own.
MODEL = ("norm", "groups", "bn_momentum", "bn_eps", "sync_bn", "pixel_mean", "pixel_std", "activation_checkpointing")
SECTIONS = ("model", "attack", "objective", "optimizer", "schedule", "train", "parallel")
ANOTHER = "another number than its default"

# What no case needs, and why.
EXCUSED = {
    "optimizer.backend": "apex needs a GPU; its rule is that of torch",
    "attack.dtype": "float64 shows formulas; 16 bits are judged by their certificate",
    "attack.precision_certificate": "of 16 bits",
    "attack.compile": "a form of the same iteration, compared with the plain one in test_compiled_attack",
    "attack.cuda_graph": "a form of the same iteration, which needs a GPU",
    "optimizer.options": "of plug-ins, which bring their own",
    "schedule.options": "of plug-ins, which bring their own",
    "train.precision": "float64 shows formulas",
    "train.deterministic": "chooses kernels",
    "train.select": "chooses among checkpoints",
    "train.patience_epochs": "ends a run early",
    "train.stop_on_drop": "ends a run early",
    "train.on_nonfinite": "of numbers that are not finite",
    "train.max_nonfinite_steps": "of numbers that are not finite",
    "train.spike_factor": "of losses that jump",
    "parallel.overlap_comm": "needs a GPU",
    "parallel.timeout_seconds": "of ranks that hang",
    **{
        f"objective:{name}.extra_label_smoothing": "of data.extra, which these cases do not mix in; see test_mixed_data"
        for name in ("standard", "pgd_at", "trades", "mart", "mixture")
    },
}


def _members(annotation: Any) -> list[Any]:
    """Return what an annotation allows: the parts of a union, without None."""
    parts = get_args(annotation) if get_origin(annotation) not in (None, Literal, tuple, dict, list) else (annotation,)
    return [part for part in parts if part is not NoneType]


def choices(field: FieldInfo) -> tuple[Any, ...] | None:
    """Return the values among which a field chooses, None where it holds numbers or words."""
    for part in field.metadata:
        if isinstance(part, Choice):
            return tuple(part.registry)
    if field.annotation is bool:
        return (True, False)
    return (
        tuple(v for part in _members(field.annotation) if get_origin(part) is Literal for v in get_args(part)) or None
    )


def fields(section: type[BaseModel], path: str) -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, field) of a section and the sections in it."""
    for name, field in section.model_fields.items():
        inner = [part for part in _members(field.annotation) if isinstance(part, type) and issubclass(part, BaseModel)]
        if inner:
            yield from fields(inner[0], f"{path}.{name}")
        else:
            yield f"{path}.{name}", field


def wanted() -> dict[str, tuple[Any, ...] | str]:
    """Return dotted name -> the values that cases must have between them, or ``ANOTHER``, of every field that decides."""
    found: dict[str, tuple[Any, ...] | str] = {"objective.name": tuple(OBJECTIVES)}
    for name in SECTIONS:
        section = RunConfig.model_fields[name].annotation
        if name == "objective":
            listed = [pair for entry in OBJECTIVES for pair in fields(OBJECTIVES[entry].Config, f"{name}:{entry}")]
        else:
            listed = [pair for part in _members(section) for pair in fields(part, name)]
        for path, field in listed:
            last = path.rsplit(".", 1)[-1]
            if (path.startswith("objective:") and last == "name") or (name == "model" and last not in MODEL):
                continue
            values = choices(field)
            if values is not None:
                found[path] = values
            elif not field.is_required():
                found[path] = ANOTHER
    return found


def seen() -> dict[str, list[tuple[Any, bool]]]:
    """Return dotted name -> (value, whether it is the default) over all cases."""
    found: dict[str, list[tuple[Any, bool]]] = {}

    def walk(section: BaseModel, path: str) -> None:
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                walk(value, f"{path}.{name}")
            else:
                found.setdefault(f"{path}.{name}", []).append(
                    (value, value == field.get_default(call_default_factory=True))
                )

    for case in CASES.values():
        config = case.config(case.worlds[0], Path("initial.pt"))
        for name in SECTIONS:
            section = getattr(config, name)
            if section is not None:
                walk(section, f"objective:{config.objective.name}" if name == "objective" else name)
        found.setdefault("objective.name", []).append((config.objective.name, False))
    return found


def missing() -> list[str]:
    """Return every value that no case has, as ``field=value``."""
    have = seen()
    gaps = []
    for path, values in wanted().items():
        if path in EXCUSED:
            continue
        pairs = have.get(path, [])
        if values == ANOTHER:
            gaps += [] if any(not default for _, default in pairs) else [f"{path}: {ANOTHER}"]
        else:
            gaps += [f"{path}={value}" for value in values if value not in [own for own, _ in pairs]]
    return gaps
