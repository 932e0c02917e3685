"""Nothing that is printed can end a command, whatever its stdout can show."""

from __future__ import annotations

import io
import sys

import pytest

from distributed_at.cli import main
from distributed_at.terminal import make_printable

TOLD = "40.0–51.2 % · eps 8/255 → 16 × 2 “é” … 95 % interval 1.7⁠–⁠20 \U0001f600"


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, *, errors: str = "strict", text: str = TOLD) -> str:
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    make_printable()
    print(text, end="", flush=True)
    print(text, end="", file=sys.stderr, flush=True)
    told = [stream.buffer.getvalue().decode(encoding) for stream in (out, err)]
    assert told[0] == told[1]
    return told[0]


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", '40.0-51.2 % . eps 8/255 -> 16 x 2 "e" ... 95 % interval 1.7-20 ?'),
        ("latin-1", '40.0-51.2 % · eps 8/255 -> 16 × 2 "é" ... 95 % interval 1.7-20 ?'),
        ("cp1252", "40.0–51.2 % · eps 8/255 -> 16 × 2 “é” … 95 % interval 1.7–20 ?"),
        ("utf-8", TOLD),
    ],
)
def test_what_an_encoding_lacks_is_shown_by_the_nearest_plain_characters(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: str
) -> None:
    assert printed(monkeypatch, encoding) == shown


def test_a_stream_that_knows_what_to_do_keeps_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, "ascii", errors="xmlcharrefreplace", text="–") == "&#8211;"


def test_streams_that_are_closed_or_not_files_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    make_printable()


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (["recipes", "show", "digits/adversarial.yaml", "description=robust – é"], 0, "description: robust - e"),
        (["recipes", "show", "digits/adversarial.yaml", "description=…"], 0, "description: ..."),
        (["plan", "dígits.yaml"], 2, "no recipe 'digits.yaml'"),
    ],
)
def test_verbs_print_on_an_ascii_stdout(
    monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, shown: str
) -> None:
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert main(words) == code
    for stream in streams:
        stream.flush()
    assert shown in "".join(stream.buffer.getvalue().decode("ascii") for stream in streams)
