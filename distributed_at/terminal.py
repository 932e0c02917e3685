"""Makes every message printable on whatever stdout and stderr are: a terminal without UTF-8 must not end finished work."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata

_HANDLER = "distributed_at.plain"
_PLAIN = {
    "–": "-", "—": "-", "−": "-", "…": "...", "×": "x", "·": ".", "→": "->", "≤": "<=", "≥": ">=", "µ": "u", "‘": "'", "’": "'",
    "“": '"', "”": '"', "─": "-", "━": "-", "│": "|",
}  # fmt: skip


def make_printable() -> None:
    """Let stdout and stderr show what their encoding lacks by the nearest plain characters, '?' where there is none."""
    codecs.register_error(_HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors=_HANDLER)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_nearest(character) for character in lost), error.end


def _nearest(character: str) -> str:
    if unicodedata.category(character) == "Cf":  # takes no place, as a word joiner
        return ""
    for shown in (_PLAIN.get(character), unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()):
        if shown:
            return shown
    return "?"
