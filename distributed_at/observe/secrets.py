"""Keeps secrets out of everything that observing writes: events, environment, wandb's config, reports.

It removes what it can recognise (values of telling environment variables, ``key=value`` pairs, credentials in URLs);
it is not a scanner for secrets that carry no such sign.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
SHORTEST_SECRET = 8  # shorter values ("true", "0") are settings, and replacing them would garble ordinary text

_ENVIRONMENT_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_SECRET_WORD = r"(?:api[_-]?key|access[_-]?key|private[_-]?key|auth[_-]?key|token|secret|password|passwd)"
_FIELD_NAME = re.compile(rf"(?:^|[_\-.]){_SECRET_WORD}$", re.IGNORECASE)
_CAPITAL_NAME = re.compile(r"^[A-Z0-9_]*(?:KEY|TOKEN|SECRET|PASSWORD|PASSWD)[A-Z0-9_]*$")
_ASSIGNMENT = re.compile(rf"((?:[\w.-]*?{_SECRET_WORD}|[A-Z0-9_]*(?:KEY|TOKEN|SECRET)[A-Z0-9_]*)\s*[=:]\s*)[^\s,;&]+")
_ASSIGNMENT_ANY_CASE = re.compile(rf"((?<![\w])[\w.-]*{_SECRET_WORD}\s*=\s*)[^\s,;&]+", re.IGNORECASE)
_URL_LOGIN = re.compile(r"(\w+://)[^/\s:@]+:[^/\s@]+@")
_OPTION = re.compile(rf"^--?[\w-]*{_SECRET_WORD}$", re.IGNORECASE)


def secret_values(environ: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Return the values of environment variables whose name says that they are secret, longest first."""
    environ = os.environ if environ is None else environ
    found = {v for k, v in environ.items() if _ENVIRONMENT_NAME.search(k) and len(v) >= SHORTEST_SECRET}
    return tuple(sorted(found, key=len, reverse=True))


def redact_text(text: str, secrets: tuple[str, ...] = ()) -> str:
    """Return ``text`` without the given values, ``token=...`` pairs and logins inside URLs."""
    for value in secrets:
        if value in text:
            text = text.replace(value, REDACTED)
    text = _ASSIGNMENT.sub(rf"\1{REDACTED}", text)
    text = _ASSIGNMENT_ANY_CASE.sub(rf"\1{REDACTED}", text)
    return _URL_LOGIN.sub(rf"\1{REDACTED}@", text)


def without_secrets(text: str) -> str:
    """Return a message or a traceback without what the process's environment holds in secret."""
    return redact_text(text, secret_values())


def redact(value: Any, secrets: tuple[str, ...] | None = None) -> Any:
    """Return ``value`` (mappings, lists, strings, numbers) with every recognised secret replaced.

    ``secrets`` are literal values to remove; None takes those of the process's environment.
    """
    secrets = secret_values() if secrets is None else secrets
    if isinstance(value, str):
        return redact_text(value, secrets)
    if isinstance(value, Mapping):
        return {
            redact_text(str(key), secrets): REDACTED
            if isinstance(item, str) and item and (_FIELD_NAME.search(str(key)) or _CAPITAL_NAME.match(str(key)))
            else redact(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        cleaned = [redact(item, secrets) for item in value]
        for position in range(1, len(cleaned)):  # a command line: "--api-key", "VALUE"
            if isinstance(value[position - 1], str) and _OPTION.match(value[position - 1]):
                cleaned[position] = REDACTED
        return cleaned
    return value
