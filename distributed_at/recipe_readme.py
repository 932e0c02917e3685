"""Writes the README of a recipe folder from its recipes, so that commands and the papers' numbers cannot drift.

Run ``python -m distributed_at.recipe_readme`` in a checkout after changing a recipe.
"""

from __future__ import annotations

import json
from pathlib import Path

from distributed_at.accelerators import attack_arithmetic, find_gpu
from distributed_at.cost import config_units
from distributed_at.models.statistics import count_macs
from distributed_at.planning import count_classes, split_sizes
from distributed_at.recipes import FOLDERS, RecipeEntry, group_by_table, list_recipes, recipe_root

_BEGIN, _END = "<!-- recipes: generated -->", "<!-- recipes: end -->"
_METRICS = {
    "clean": "clean",
    "clean_branch_clean": "clean (MBN_clean)",
    "aa": "AutoAttack",
}
# Folders whose rows cost so much that a reader wants to know before anything else, and the GPU of the paper's runs.
_COSTED = {"imagenet": "v100"}


def recipe_tables(entries: list[RecipeEntry]) -> str:
    """Return Markdown: one table of runs a paper's table, with the command's reference and the paper's numbers."""
    parts = []
    for (title, table), group in group_by_table(entries).items():
        metrics = list(dict.fromkeys(name for entry in group if entry.paper for name in entry.paper.numbers))
        parts.append(f"### {title}, {table}\n" if title else "### Recipes of no paper\n")
        head = ["recipe", "row" if title else "what it is", *(_metric(name) for name in metrics)]
        gpu = _COSTED.get(group[0].ref.split("/")[0])
        if gpu is not None:
            head += [f"{gpu.upper()} hours", "status"]
        lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * 2 + " ---: |" * len(metrics)]
        if gpu is not None:
            lines[-1] += " ---: | --- |"
        for entry in group:
            label = (entry.paper.row if entry.paper else "") or entry.description
            numbers = entry.paper.numbers if entry.paper else {}
            cells = [_number(numbers.get(name)) for name in metrics]
            if gpu is not None:
                cells += [_gpu_hours(entry, gpu), _status(entry)]
            lines.append("| " + " | ".join([f"`{entry.ref}`", label, *cells]) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def readme(folder: str, *, text: str, entries: list[RecipeEntry]) -> str:
    """Return ``text`` (a folder's README) with its generated part made anew."""
    own = [entry for entry in entries if entry.ref.startswith(f"{folder}/")]
    generated = f"{_BEGIN}\n{recipe_tables(own)}{_END}"
    if _BEGIN not in text or _END not in text:
        return f"{text.rstrip()}\n\n{generated}\n"
    head, _, rest = text.partition(_BEGIN)
    return head + generated + rest.partition(_END)[2]


def _gpu_hours(entry: RecipeEntry, gpu: str) -> str:
    """Return the training's GPU hours at the published rate of ``plan``, to two digits."""
    config = entry.config
    train, _ = split_sizes(config.data)
    classes = count_classes(config.data)
    macs = count_macs(config.model, num_classes=classes, image_size=config.data.image_size)
    flops = config_units(config).total * 2.0 * macs * train * config.train.epochs
    arithmetic = attack_arithmetic(config.train.precision, config.attack.dtype if config.attack else None)
    hours = flops / (find_gpu(gpu).rate(arithmetic).tflops * 1e12) / 3600
    return f"{float(f'{hours:.2g}'):,.0f}" if hours >= 1 else "under 1"


def _status(entry: RecipeEntry) -> str:
    """Say where a recipe was measured: the file in ``benchmarks/results`` that holds its accuracies, row by row."""
    name, _, row = entry.ref.partition("#")
    for path in sorted((recipe_root() / "benchmarks" / "results").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("recipe") != name:
            continue
        measured = {result.get("row", "") for result in content.get("results", []) if result.get("evaluations")}
        if row in measured:  # other records may name a recipe for its network alone
            return f"measured: [{path.name}](../benchmarks/results/{path.name})"
    return "run by the tests" if name.endswith("smoke_strategies.yaml") else "not run"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def _metric(name: str) -> str:
    return _METRICS.get(name, f"PGD-{name[3:]}" if name.startswith("pgd") else name)


def main(root: Path | None = None) -> None:
    """Rewrite the READMEs of all recipe folders."""
    root = root or recipe_root()
    entries = list_recipes(root)
    for folder in FOLDERS:
        path = root / folder / "README.md"
        path.write_text(readme(folder, text=path.read_text(encoding="utf-8"), entries=entries), encoding="utf-8")


if __name__ == "__main__":
    main()
