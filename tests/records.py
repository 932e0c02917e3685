"""Run folders written by hand whose recipe and protocols are whole, as a run would leave them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distributed_at.config import EvaluationEntry, RunConfig
from distributed_at.evaluation.kinds import KINDS
from distributed_at.evaluation.protocol import build_protocol
from distributed_at.recipes import dump_yaml, load_recipe


def recipe(numbers: Mapping[str, float], final: str, *words: str) -> RunConfig:
    """Return a recipe that names a paper's numbers, on a folder of images, so that any count of them is whole."""
    listed = ", ".join(f"{name}: {value}" for name, value in numbers.items())
    paper = f"paper={{title: P, table: T1, row: r, numbers: {{{listed}}}}}"
    data = "data={dataset: folder, path: /nowhere, num_classes: 10, augment: {crop: random_resized}}"
    return load_recipe("digits/adversarial.yaml", [data, paper, f"evaluation.final={final}", *words]).config


def protocol(config: RunConfig, entry: EvaluationEntry, *, weights: str = "w", **settings: Any) -> dict[str, Any]:
    """Return the record of one single evaluation of a recipe."""
    found = build_protocol(
        entry, weights=weights, ids=np.arange(9), num_classes=10, training_attack=config.attack, split="test",
        dataset=config.data.dataset, **settings,
    )  # fmt: skip
    return found.to_dict()


def singles(config: RunConfig) -> list[EvaluationEntry]:
    """Return a recipe's evaluations, one a protocol."""
    return [single for entry in config.evaluation.final for single in KINDS[entry.kind].single_entries(entry)]


def write(folder: Path, config: RunConfig, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write recipe and summaries; each of ``rows`` is a summary, of which the split is the test's where it says none."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_yaml(config))
    for number, row in enumerate(rows):
        place = folder / "evaluations" / str(number)
        place.mkdir(parents=True)
        held = {"split": "test", "branch": "adv", "metric": "robust_accuracy"}
        (place / "summary.json").write_text(json.dumps({**held, **row}))
    return folder
