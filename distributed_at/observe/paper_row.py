"""The row of a paper's table that a run reproduces: what it changed of the recipe, and which of its numbers measure the same.

A paper's number stands beside ours only where both measure the same: the recipe is the row's, and eps, norm, steps, step,
loss, target, split and number of images of the measurement are those that the row's recipe asks for.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from distributed_at.catalogue.norms import recorded_norm
from distributed_at.config import EvaluationEntry, RunConfig
from distributed_at.errors import UserError
from distributed_at.evaluation.kinds import KINDS
from distributed_at.observe.record import Measurement, RunRecord
from distributed_at.recipes import diff, list_recipes

# Fields that say how, where or in whose name a run is made, not what it trains and measures. Another seed is a repetition.
_OF_HOW = re.compile(
    r"^(name|description|paper\b.*|seed|plugins\b.*|log\b.*|checkpoint\b.*|parallel\b.*|evaluation\b.*"
    r"|data\.(path|download|backend|prefetch|num_threads)|train\.(micro_batch_size|deterministic|on_nonfinite"
    r"|max_nonfinite_steps|spike_factor|init_from)|optimizer\.backend|attack\.(compile|cuda_graph|precision_certificate))$"
)
# What a protocol says beside what was asked for: the model, its names, the samples' hash and their number.
_OF_RESULT = (
    "weights",
    "seed",
    "model",
    "name",
    "title",
    "hash",
    "protocol_hash",
    "format",
    "data_ids",
    "num_samples",
    "preprocessing",
    "libraries",
)
_SYNONYMS = {"autoattack": "aa", "natural": "clean", "nat": "clean"}


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """A run beside the row that its recipe names.

    Attributes:
        config: the row's recipe as shipped; the run's own where no shipped recipe has this row.
        differences: what the run changed of it, a line a field.
        numbers: the paper's, in percent, by the names of its recipe.
    """

    config: RunConfig
    differences: tuple[str, ...]
    numbers: Mapping[str, float]

    def number(self, measurement: Measurement) -> float | None:
        """Return the paper's number (percent) that measures the same as a measurement of the run; None = there is none."""
        found = self.named(measurement)
        return found if found is not None and not self.differences and self.is_measured_alike(measurement) else None

    def named(self, measurement: Measurement) -> float | None:
        """Return the number that the paper prints under a measurement's name, whatever was changed.

        ``paper.numbers`` may name a branch too (``clean_adv``, ``clean_branch_clean``): that entry wins over the plain
        name. Plain names speak of the branch that faces the attack; they say nothing of a mixture's clean branch.
        """
        if measurement.split not in ("test", ""):
            return None
        aliases = names_of(measurement)
        branch = plain(measurement.branch)
        exact = {word for alias in aliases for word in (alias + branch, f"{branch}branch{alias}")} if branch else set()
        other_branch = branch == "clean" and recorded_norm(self.config.model.model_dump()).branches
        for wanted in (exact, set() if other_branch else aliases):
            for name, value in self.numbers.items():
                if plain(str(name)) in wanted:
                    return float(value)
        return None

    def is_measured_alike(self, measurement: Measurement) -> bool:
        """Whether an evaluation of the row's recipe is the one that was made, on as many images."""
        if measurement.split != "test" or not measurement.details:
            return False
        images = self.config.data.facts.test
        if images is not None and measurement.total != images:
            return False
        return any(_settings(entry, self.config).items() <= _told(measurement).items() for entry in self.entries())

    def entries(self) -> Iterator[EvaluationEntry]:
        """Yield every single evaluation of the row's recipe."""
        for entry in self.config.evaluation.final:
            yield from KINDS[entry.kind].single_entries(entry)

    def unmeasured(self, measurements: list[Measurement]) -> list[str]:
        """Return the names of the recipe's evaluations that no measurement of the test images answers."""
        told = [_told(m) for m in measurements if m.split == "test"]
        return [
            entry.name or KINDS[entry.kind].short_name(entry)
            for entry in self.entries()
            if not any(_settings(entry, self.config).items() <= found.items() for found in told)
        ]


def _settings(entry: EvaluationEntry, config: RunConfig) -> dict[str, Any]:
    """Return what a protocol must say to be this entry's, as JSON texts."""
    kind = KINDS[entry.kind]
    attack = kind.attack_of(entry, config.attack)
    fields: dict[str, Any] = {"kind": entry.kind}
    if attack is not None:
        fields |= {"norm": attack.norm, "eps": attack.eps}
    if entry.branch is not None:
        fields["branch"] = entry.branch
    fields |= kind.settings(entry, attack, config.data.num_classes or config.data.facts.classes or 0)
    return {key: json.dumps(_number(value)) for key, value in fields.items() if key not in _OF_RESULT}


def _told(measurement: Measurement) -> dict[str, str]:
    return {k: json.dumps(_number(v)) for k, v in measurement.details.items() if k not in _OF_RESULT}


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@functools.cache
def _shipped() -> dict[tuple[str, str, str], RunConfig]:
    """Return (title, table, row) of a paper -> the shipped recipe of it."""
    found = {}
    for entry in list_recipes():
        if entry.paper is not None and entry.paper.numbers:
            found[entry.paper.title, entry.paper.table, entry.paper.row] = entry.config
    return found


def paper_row(record: RunRecord) -> PaperRow | None:
    """Return the row that a run's recipe names; None where it names none, or cannot be read here."""
    paper = record.section("paper")
    if not paper.get("numbers"):
        return None
    try:
        own = RunConfig.model_validate_json(json.dumps(dict(record.recipe)))
    except (
        ValidationError,
        TypeError,
        ValueError,
        UserError,
    ):  # of another version, or of plug-ins that are not loaded
        return None
    row = _shipped().get((str(paper.get("title")), str(paper.get("table")), str(paper.get("row") or "")), own)
    changed = tuple(line for line in diff(row, own) if not _OF_HOW.match(line.split(":")[0]))
    return PaperRow(config=row, differences=changed, numbers=paper["numbers"])


def paper_number(record: RunRecord, measurement: Measurement) -> float | None:
    """Return the paper's number (percent) that measures the same as a measurement of a run; None = there is none."""
    row = paper_row(record)
    return None if row is None else row.number(measurement)


def plain(name: str) -> str:
    """Return a protocol's or metric's name as papers and recipes may write it alike: letters and digits alone."""
    word = re.sub(r"[^a-z0-9]", "", name.lower())
    return _SYNONYMS.get(word, word)


def names_of(measurement: Measurement) -> set[str]:
    """Return the names under which a paper's number may stand: ``clean``, ``aa``, ``pgd20``, ``pgd10x5``."""
    kind = str(measurement.details.get("kind") or "")
    if kind in KINDS:
        return {plain(name) for name in KINDS[kind].paper_names({**measurement.details, "name": measurement.protocol})}
    name = measurement.protocol.split(" ")[0]  # an event of training holds the protocol's name alone
    return {plain(measurement.protocol), plain(name), *(["clean"] if measurement.is_clean else [])}
