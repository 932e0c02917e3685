"""The words of a command line: each is an option, an option's value, an argument, or ``key=value``; others are refused.

argparse alone cannot do this: it has no second run of arguments after an option, and a ``key=value`` may stand anywhere.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from distributed_at.errors import did_you_mean

OVERRIDE = re.compile(r"^[A-Za-z_][\w.]*=")
_LONG_DASHES = "‐‑‒–—―−﹣－"
_QUOTES = "“”„‟‘’‚‛«»＂＇"
_SHOWN = 60  # characters of a word that a message quotes


class WordError(Exception):
    """A word that means nothing here; the message says what to write."""


@dataclass
class Words:
    """A command line taken apart.

    Attributes:
        overrides: the ``key=value`` words, in order.
        rest: everything else, for argparse.
    """

    overrides: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)


def quoted(word: str) -> str:
    """Return a word in quotes, cut where it is long."""
    return repr(word if len(word) <= _SHOWN else f"{word[:_SHOWN]}…")


def split_words(words: Sequence[str], parser: argparse.ArgumentParser) -> Words:
    """Take a command line apart; ``parser`` says which options have values.

    Raises:
        WordError: a pasted dash or quotes, an option or override given twice with different values.
    """
    found = Words()
    values: dict[str, str] = {}
    given = list(words)
    at = 0
    while at < len(given):
        word = given[at]
        _check_characters(word)
        inner = subparser(parser, word)
        if inner is not None:
            parser = inner
            found.rest.append(word)
        elif word.startswith("-") and len(word) > 1:
            name, equals, value = word.partition("=")
            action = _option(parser, name)
            found.rest.append(word)
            if action is not None and action.nargs is None and not equals and at + 1 < len(given):
                at += 1
                value = given[at]
                _check_characters(value)
                found.rest.append(value)
            if action is not None and action.nargs is None and not isinstance(action, argparse._AppendAction):
                _once(values, action.option_strings[0], value, "option ")
        elif OVERRIDE.match(word):
            key, _, value = word.partition("=")
            _once(values, key, value, "")
            found.overrides.append(word)
        else:
            found.rest.append(word)
        at += 1
    return found


def refuse(extra: Sequence[str], words: Sequence[str], parser: argparse.ArgumentParser, verb: str | None) -> str:
    """Say why the words ``extra`` of a command line mean nothing, and what was probably meant.

    Args:
        extra: what is left over, in order.
        words: the whole command line.
        parser: the parser of the verb, or of all verbs where none was understood.
        verb: the verb, None where none was understood.
    """
    from distributed_at.recipe_errors import field_paths

    word = extra[0]
    fields = field_paths()
    takes_overrides = any(action.dest == "overrides" for action in parser._actions)
    spaced = _spaced(words)
    if spaced is not None:
        return f"spaces round '=' make words of their own: write {quoted(spaced)}"
    if word.startswith("-"):
        name = word.partition("=")[0]
        options = sorted({o for action in parser._actions for o in action.option_strings})
        hint = did_you_mean(name, options)
        bare = name.lstrip("-").replace("-", "_")
        fits = [path for path in fields if path == bare or path.rsplit(".", 1)[-1] == bare]
        if takes_overrides and fits and f"--{bare.replace('_', '-')}" not in options:
            value = word.partition("=")[2] or _after(words, word) or "VALUE"
            hint = f" A recipe's field is written without dashes: {fits[0]}={value[:_SHOWN]}"
        return f"there is no option {quoted(name)}.{hint}"
    if takes_overrides and "=" in word:
        key, _, value = word.partition("=")
        right = re.sub(r"[\[(](\w+)[\])]", r".\1", key).replace("-", "_").replace("/", ".")
        if OVERRIDE.match(f"{right}="):
            return f"{quoted(word)} is not an override: write {quoted(f'{right}={value}')}"
        return f"{quoted(word)} is not an override: one is written key=value, e.g. optimizer.lr=0.05"
    if takes_overrides:
        if word in fields:
            pair = f"{word}={_after(words, word) or 'VALUE'}"
            return f"{quoted(word)} is a field of the recipe: write {quoted(pair)}"
        if "." in word and not word.endswith((".yaml", ".yml")):
            return f"{quoted(word)} is no argument of '{verb}'.{did_you_mean(word, fields)} An override is written key=value"
    options = [o for action in parser._actions for o in action.option_strings]
    hint = did_you_mean(f"--{word}", options)
    arguments = [a.metavar or a.dest for a in parser._actions if not a.option_strings and a.dest != "overrides"]
    takes = " and ".join(
        [*(f"{name}" for name in arguments if isinstance(name, str)), *(["key=value words"] * takes_overrides)]
    )
    return f"'{verb}' does not know what to do with {quoted(word)}.{hint} It takes {takes or 'options alone'}"


def _check_characters(word: str) -> None:
    if word[:1] in _LONG_DASHES and word[:1]:
        rest = word.lstrip(_LONG_DASHES + "-")
        raise WordError(f"{quoted(word)} begins with a dash that pasted text has; write {quoted('--' + rest)}")
    _, equals, value = word.partition("=")
    for part in (word, value if equals else ""):
        if part[:1] and (part[0] in _QUOTES or part[-1] in _QUOTES):
            plain = word.translate({ord(c): None for c in _QUOTES})
            raise WordError(f"{quoted(word)} has quotes that pasted text has; write {quoted(plain)}")
    if "＝" in word:
        raise WordError(f"{quoted(word)} has an '=' that pasted text has; write {quoted(word.replace('＝', '='))}")
    hidden = [c for c in word if (not c.isprintable() and c not in "\n\t") or c in "\u00a0\u200b\ufeff"]
    if hidden:
        raise WordError(f"{quoted(word)} has a character that cannot be seen (U+{ord(hidden[0]):04X}); type it anew")


def _once(values: dict[str, str], key: str, value: str, what: str) -> None:
    if values.setdefault(key, value) != value:
        raise WordError(f"{what}{key} is given twice: {quoted(values[key])} and {quoted(value)}")


def subparser(parser: argparse.ArgumentParser, word: str) -> argparse.ArgumentParser | None:
    """Return the parser of the verb ``word`` of ``parser``, None where it is none."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) and word in action.choices:
            chosen: argparse.ArgumentParser = action.choices[word]
            return chosen
    return None


def _option(parser: argparse.ArgumentParser, name: str) -> argparse.Action | None:
    return next((action for action in parser._actions if name in action.option_strings), None)


def _spaced(words: Sequence[str]) -> str | None:
    """Return ``key=value`` where a command line has spaces round its ``=``."""
    for at, word in enumerate(words):
        before = words[at - 1] if at else ""
        after = words[at + 1] if at + 1 < len(words) else "VALUE"
        if word == "=":
            return f"{before}={after}"
        if word.startswith("=") and len(word) > 1:
            return f"{before}{word}"
        alone = word.endswith("=") and OVERRIDE.match(word) and at + 1 < len(words)
        if alone and not OVERRIDE.match(after) and not after.startswith("-"):
            return f"{word}{after}"
    return None


def _after(words: Sequence[str], word: str) -> str | None:
    at = list(words).index(word) + 1 if word in words else len(words)
    return words[at] if at < len(words) and not words[at].startswith("-") else None
