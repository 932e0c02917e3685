"""Reads a run folder into one object that tables and reports are made from; it computes nothing about the model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from distributed_at.catalogue.datasets import recorded_dataset
from distributed_at.errors import ConfigError, DataError
from distributed_at.evaluation.kinds import KINDS
from distributed_at.evaluation.protocol import OF_THE_RUN, Protocol
from distributed_at.evaluation.verdicts import TITLES, Verdict
from distributed_at.observe.environment import read_environment
from distributed_at.observe.events import EVENTS_FILE, read_events, select
from distributed_at.statistics import wilson

RECIPE_FILE = "recipe.yaml"
# Fields that belong to the measured model, not to how it was measured.
MODEL_FIELDS = ("hash", "protocol_hash", "weights", "model", "name", "title")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One accuracy with the protocol that produced it. Shares lie in [0, 1]."""

    protocol: str
    hash: str
    branch: str
    split: str
    metric: str
    correct: int | None
    total: int | None
    accuracy: float
    low: float | None
    high: float | None
    seconds: float | None
    success: float | None = None
    step: float | None = None
    epoch: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None  # where its rows by sample are kept

    @property
    def protocol_hash(self) -> str:
        """Hash of how it was measured, whatever the model; empty where no protocol was recorded."""
        try:
            return Protocol.from_dict(dict(self.details)).protocol_hash if self.details.get("kind") in KINDS else ""
        except (TypeError, ValueError, ConfigError):
            return ""

    @property
    def is_clean(self) -> bool:
        """True where no attack was made."""
        return self.metric.startswith("clean") or self.protocol.lower().startswith(("clean", "natural"))

    @property
    def strength(self) -> int:
        """Place in tables: clean first, then attacks, ensembles last."""
        kind = str(self.details.get("kind") or "")
        return KINDS[kind].strength if kind in KINDS else int(not self.is_clean)

    @property
    def identity(self) -> tuple[str, str, str, str]:
        """What makes it one row of a table."""
        return self.protocol, self.branch, self.split, self.metric

    @property
    def way(self) -> dict[str, Any]:
        """How it was measured, whatever the model: what the protocol says beside the weights and its defaults.

        A protocol that an earlier version recorded is read as this one would record it.
        """
        content = dict(self.details)
        if content.get("kind") in KINDS:
            with contextlib.suppress(TypeError, ValueError, ConfigError):
                content = json.loads(Protocol.from_dict(content).canonical())
        return {key: value for key, value in content.items() if key not in MODEL_FIELDS}

    def comparable(self, other: Measurement) -> bool:
        """True where both were measured in the same way: equal hashes, or equal protocols apart from the model."""
        if self.identity != other.identity or self.total != other.total:
            return False
        if self.hash and self.hash == other.hash:
            return True
        mine, theirs = ({k: v for k, v in one.way.items() if k not in OF_THE_RUN} for one in (self, other))
        return bool(mine) and mine == theirs


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything a run folder says."""

    folder: Path
    name: str
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    events: list[dict[str, Any]]
    measurements: list[Measurement]

    def rows(self, kind: str) -> list[Mapping[str, Any]]:
        """Return the events of one kind in order of step."""
        return select(self.events, kind)

    def section(self, name: str) -> Mapping[str, Any]:
        """Return a section of the recipe, empty where it has none."""
        found = self.recipe.get(name)
        return found if isinstance(found, Mapping) else {}

    @property
    def start(self) -> Mapping[str, Any]:
        """The first ``run_start`` event, or an empty mapping."""
        return next((row for row in self.events if row["event"] == "run_start"), {})

    @property
    def num_classes(self) -> int | None:
        """Classes of the data, from the recipe."""
        data = self.section("data")
        found = recorded_dataset(data)
        return data.get("num_classes") or (None if found is None else found.classes)

    def held_out(self) -> dict[tuple[str, ...], list[Measurement]]:
        """Return the evaluations made while training, by (split, protocol, branch, metric), in order of step."""
        found: dict[tuple[str, ...], list[Measurement]] = {}
        for row in self.rows("evaluation"):
            one = parse_measurement(row)
            if one is not None and one.split != "test" and one.epoch is not None:
                found.setdefault((one.split, one.protocol, one.branch, one.metric), []).append(one)
        return found

    @property
    def verdicts(self) -> list[Verdict]:
        """Verdicts that evaluations of this run kept in its events; of each split those of the last evaluation."""
        kept = [content for row in self.rows("verdict") for content in row.get("verdicts") or ()]
        return [Verdict.from_dict(content) for content in kept if content.get("code") in TITLES]

    @property
    def paper_numbers(self) -> Mapping[str, float]:
        """The paper's numbers in percent, by metric."""
        return self.section("paper").get("numbers") or {}


def _share(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def parse_measurement(row: Mapping[str, Any]) -> Measurement | None:
    """Read an ``evaluation`` event or a ``summary.json``; None where it holds no accuracy."""
    protocol = row.get("protocol")
    details = dict(protocol) if isinstance(protocol, Mapping) else {}
    name = details.get("name") or row.get("name") or (protocol if isinstance(protocol, str) else None) or "evaluation"
    correct, total = row.get("correct"), row.get("total")
    if not (isinstance(correct, int) and isinstance(total, int) and 0 <= correct <= total and total > 0):
        correct, total = None, None
    accuracy = _share(row.get("accuracy")) if correct is None or total is None else correct / total
    if accuracy is None:
        return None
    low, high = _share(row.get("low")), _share(row.get("high"))
    if correct is not None and total is not None and (low is None or high is None):
        low, high = wilson(correct, total)
    return Measurement(
        protocol=str(name), hash=str(details.get("hash") or row.get("hash") or row.get("protocol_hash") or ""),
        branch=str(row.get("branch") or ""), split=str(row.get("split") or ""), metric=str(row.get("metric") or "accuracy"),
        correct=correct, total=total, accuracy=accuracy, low=low, high=high,
        seconds=_share(row.get("seconds")), success=_share(row.get("attack_success_rate")), step=_share(row.get("step")), epoch=_share(row.get("epoch")), details=details,
    )  # fmt: skip


def _read_summaries(folder: Path) -> list[Measurement]:
    """Read the evaluations; of one protocol measured on several checkpoints, the newest stands."""
    paths = sorted((folder / "evaluations").glob("**/summary.json"), key=lambda path: (_modified(path), str(path)))
    found: dict[tuple[Any, ...], Measurement] = {}
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # another process may be writing it
        for row in content if isinstance(content, list) else [content]:
            measurement = parse_measurement(row) if isinstance(row, Mapping) else None
            if measurement is not None:
                measurement = replace(measurement, folder=path.parent)
                found[measurement.identity, json.dumps(measurement.way, sort_keys=True, default=str)] = measurement
    return sorted(found.values(), key=_strength)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _strength(one: Measurement) -> tuple[bool, bool, int, str, str]:
    """Order of a table: clean first, then attacks by their steps, AutoAttack last."""
    steps = one.details.get("num_steps")
    return (
        not one.is_clean, one.strength > 1, steps if isinstance(steps, int) else 0,
        one.protocol, one.branch,
    )  # fmt: skip


def load_run(run_folder: Path | str) -> RunRecord:
    """Read a run folder, whether the run is finished or not.

    Raises:
        DataError: the folder does not exist or holds nothing of a run.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise DataError(f"there is no run folder {folder}")
    recipe: Any = {}
    if (folder / RECIPE_FILE).is_file():
        try:
            recipe = yaml.safe_load((folder / RECIPE_FILE).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise DataError(f"{folder / RECIPE_FILE} is not valid YAML: {error}") from None
    events = read_events(folder)
    measurements = _read_summaries(folder)
    known = {m.identity for m in measurements}
    if not events and not recipe and not measurements:
        raise DataError(f"{folder} holds neither {RECIPE_FILE} nor {EVENTS_FILE} nor evaluations: it is no run folder")
    latest: dict[tuple[str, ...], Measurement] = {}
    for row in select(events, "evaluation"):
        found = parse_measurement(row)
        if found is not None and found.split == "test" and found.identity not in known:
            latest[found.identity] = found
    recipe = recipe if isinstance(recipe, Mapping) else {}
    return RunRecord(
        folder=folder,
        name=str(recipe.get("name") or folder.resolve().name),
        recipe=recipe,
        environment=read_environment(folder),
        events=events,
        measurements=[*latest.values(), *measurements],
    )
