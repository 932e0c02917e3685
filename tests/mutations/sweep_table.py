"""Writes what the sweep found: a row a file, and every survivor with the reason why it may live."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

REASONS = Path(__file__).parent / "survivors.yaml"


@dataclass
class Counts:
    """Mutants of one file: not drawn, and of those drawn what became of them."""

    undrawn: int = 0
    killed: int = 0
    survived: int = 0
    timed_out: int = 0
    left: int = 0

    @property
    def drawn(self) -> int:
        return self.killed + self.survived + self.timed_out + self.left


@dataclass(frozen=True)
class Survivor:
    """A mutant that no test noticed: the changed line before and after, without indentation."""

    file: str
    line: int
    operator: str
    old: str
    new: str


def survivor(path: str, line: int, operator: str, diff: str) -> Survivor:
    """Read the changed lines out of cosmic-ray's diff."""
    lines = [text for text in diff.splitlines() if not text.startswith(("--- ", "+++ "))]
    old, new = (" ".join(t[1:].strip() for t in lines if t.startswith(sign)) for sign in ("-", "+"))
    return Survivor(path.split("/", 1)[1], line, operator.removeprefix("core/"), old, new)


def reasons() -> list[dict[str, str]]:
    """Return the reasons on file: ``file``, ``old``, ``new`` (absent: whatever it became) and ``why``."""
    return yaml.safe_load(REASONS.read_text()) or []


def reason_for(found: Survivor, known: list[dict[str, str]]) -> str:
    """Return why this survivor may live, or nothing."""
    for entry in known:
        if entry["file"] == found.file and entry["old"] == found.old and entry.get("new", found.new) == found.new:
            return entry["why"]
    return ""


def table(results: dict[str, tuple[Counts, list[Survivor]]], *, tool: str, share: float, seed: int) -> tuple[str, int]:
    """Return the Markdown and how many survivors have no reason."""
    known = reasons()
    total = Counts()
    rows = []
    for file, (counts, _) in results.items():
        for name in vars(total):
            setattr(total, name, getattr(total, name) + getattr(counts, name))
        rows.append(_row(f"`{file}`", counts))
    lines = [
        "# Automatic mutants of the files that decide numbers",
        "",
        f"Made by `make mutate` with {tool}: of each file {share:.0%} of the places that it can mutate were drawn with "
        f"seed {seed}, and of each place one mutant. README.md here says how to read this.",
        "",
        "| file | mutants in all | drawn | killed | survived | timed out | not run yet |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *rows,
        _row("**all**", total),
        "",
        "## Survivors",
        "",
        "| file, line | was | became | why it may live |",
        "|---|---|---|---|",
    ]
    unexplained = 0
    for _, survivors in results.values():
        for found in sorted(survivors, key=lambda s: (s.line, s.new)):
            why = reason_for(found, known)
            unexplained += not why
            cells = (f"{found.file}:{found.line}", _code(found.old), _code(found.new), why or "**no reason yet**")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n", unexplained


def _row(name: str, c: Counts) -> str:
    numbers = (c.undrawn + c.drawn, c.drawn, c.killed, c.survived, c.timed_out, c.left)
    return f"| {name} | {' | '.join(map(str, numbers))} |"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else "(gone)"
