"""Prints which planted mutations the suite caught."""

from __future__ import annotations

from tests.conformance.scoreboard import SCOREBOARD


def pytest_terminal_summary(terminalreporter) -> None:
    """Write the table and its last line, 'caught X of Y planted mutations'."""
    if not SCOREBOARD:
        return
    terminalreporter.section("attack conformance")
    width = max(map(len, SCOREBOARD))
    for name, how in SCOREBOARD.items():
        mark = "caught by" if how else "NOT CAUGHT"
        terminalreporter.write_line(f"{name:<{width}}  {mark} {(how or '')[:110]}")
    caught = sum(how is not None for how in SCOREBOARD.values())
    terminalreporter.write_line(f"caught {caught} of {len(SCOREBOARD)} planted mutations")
