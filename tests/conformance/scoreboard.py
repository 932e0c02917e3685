"""Mutation -> the check and message that caught it, None = not caught; filled by the tests, printed by conftest."""

SCOREBOARD: dict[str, str | None] = {}
