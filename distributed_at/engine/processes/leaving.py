"""Ends this process at once from whatever thread finds out that it must; what others would miss is put in order first."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

_last: list[Callable[[], object]] = []


def before_leaving(function: Callable[[], object]) -> None:
    """Call ``function`` should this process ``leave``: a lock that it holds would make the next start wait."""
    _last.append(function)


def leave(code: int, message: str = "") -> NoReturn:
    """Print a message on stderr and end the process without tidying: its main thread may wait for what never comes."""
    with contextlib.suppress(Exception):
        if message:
            print(message, file=sys.stderr, flush=True)
    for function in _last:
        with contextlib.suppress(Exception):
            function()
    os._exit(code)
