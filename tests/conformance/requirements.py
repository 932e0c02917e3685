"""What every objective must bring, said in sentences where it is missing: checks, planted faults, counted passes, docs."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from distributed_at.objectives import ITSELF, Objective, ObjectiveContext, Passes
from tests.conformance.kit import Recorder, batch_of
from tests.conformance.networks import CLASSES

SOURCE_WORDS = ("section", "eq.", "table", "algorithm")


def missing(name: str, objective: type[Objective], tests: ModuleType | None, *, home: str) -> list[str]:
    """Return a sentence for each thing that an objective lacks; ``home`` is where its conformance should stand."""
    file = Path(inspect.getfile(objective)).name
    lacks = []
    for fact in ("title", "source"):
        if not getattr(objective, fact, ""):
            lacks.append(f"objective '{name}' has no {fact}: give the class {fact} = \"...\", which reports show")
    if objective.passes.__func__ is Objective.passes.__func__:
        lacks.append(f"objective '{name}' does not say its passes: plan, report and MFU would be wrong without them")
    if not (inspect.getmodule(objective).__doc__ or "").strip():
        lacks.append(f"objective '{name}': {file} has no docstring, which is its entry in docs/objectives.md")
    if not any(word in (objective.__doc__ or "") for word in SOURCE_WORDS):
        lacks.append(f"objective '{name}': the class's docstring names no section, equation or table of its paper")
    if objective.Config.model_fields["name"].default != name:
        lacks.append(f"objective '{name}': the default of Config.name is not '{name}'")
    if tests is None or not getattr(tests, "CHECKS", []):
        lacks.append(
            f"objective '{name}' has no conformance check: compare its loss with the paper's in {home} (CHECKS)"
        )
    if tests is None or not any(m.file.endswith(file) for m in getattr(tests, "MUTATIONS", [])):
        lacks.append(f"objective '{name}' has no planted fault in {file}: add one to {home} (MUTATIONS)")
    if tests is not None and not getattr(tests, "SETTINGS", []):
        lacks.append(f"objective '{name}' has no settings to be tried with: list them in {home} (SETTINGS)")
    return lacks


def counted(objective: type[Objective], fields: dict[str, Any], *, shared_statistics: bool) -> Passes:
    """Return the passes that one step makes for an image, as counted."""
    section = objective.Config(**fields)
    batch, adv = batch_of(20, group=10)
    needs, size = objective.needs(section), batch.images.shape[-1]
    context = ObjectiveContext(
        num_classes=CLASSES, seed=0, shared_statistics=shared_statistics, places=len(batch), image_size=size
    )
    built, recorder, looks = objective(section, context), Recorder(), []
    if needs.itself:
        built.views = {ITSELF: lambda x: looks.append(x) or recorder.model(x)}
    batch = built.prepare(batch)
    terms = built.loss(recorder, batch, adv if needs.attack == "given" else None)
    with_graph = [call for call in recorder.calls if call["grad"]]
    gradients = torch.autograd.grad(terms.loss, [call["logits"] for call in with_graph], allow_unused=True)
    trains = {id(call) for call, gradient in zip(with_graph, gradients, strict=True) if gradient is not None}
    built.after_step(recorder, batch)
    trained: dict[str, float] = {}
    watched, moving = 0.0, []
    for call in recorder.calls:
        if call["bn"] == "train" and needs.attack == "own":  # they are the clean ones before it moved them first
            moving.append(call["branch"])
        elif call["bn"] == "train":
            moving += [kind for kind, own in (("clean", batch.images), ("adv", adv)) if _among(call["x"], own)]
        if id(call) in trains:
            trained[call["branch"]] = trained.get(call["branch"], 0.0) + len(call["x"]) / len(batch)
        else:
            watched += len(call["x"]) / len(batch)
    return Passes(trained=trained, moving=tuple(moving), watched=watched, attacked=len(looks))


def _among(shown: torch.Tensor, images: torch.Tensor) -> bool:
    """Whether any image of a kind was shown."""
    return bool((shown[:, None] == images[None]).flatten(2).all(dim=2).any())


def names_compared(source: str, attribute: str) -> list[int]:
    """Return the lines of Python source that compare something's ``attribute.name`` with a text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
            if any(side.endswith(f"{attribute}.name") for side in sides):
                found.append(node.lineno)
    return found
