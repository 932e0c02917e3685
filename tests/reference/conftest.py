"""Prints how far each case's runs were from the reference."""

from __future__ import annotations

from tests.reference.table import TABLE

KINDS = ("weights", "optimiser", "average", "statistics", "log")


def pytest_terminal_summary(terminalreporter) -> None:
    """Write a line a case: the largest difference of each kind over every world in which it was trained."""
    if not TABLE:
        return
    terminalreporter.section("reference run: largest differences, relative")
    width = max(map(len, TABLE))
    head = "  ".join(f"{kind:>10}" for kind in KINDS)
    terminalreporter.write_line(f"{'case':<{width}}  {head}  ranks x forwards")
    for name, (worlds, apart) in sorted(TABLE.items()):
        numbers = "  ".join(f"{apart[kind]:10.1e}" if kind in apart else f"{'-':>10}" for kind in KINDS)
        terminalreporter.write_line(f"{name:<{width}}  {numbers}  {' '.join(sorted(worlds))}")
