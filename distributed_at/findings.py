"""What a check of a machine found: one line of the doctor's table, on one rank or over all."""

from __future__ import annotations

from dataclasses import dataclass

OK, ABSENT, SLOW, BROKEN = "ok", "absent", "slow", "broken"


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        part: what was looked at.
        state: OK, ABSENT (it will run without), SLOW (it will run, slowly) or BROKEN.
        detail: what was seen.
        fix: the command or change that mends it, '' where nothing is to be mended.
    """

    part: str
    state: str
    detail: str
    fix: str = ""
