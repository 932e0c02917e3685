"""A lost rank is told from a fault of one's own, and each rank's last words are kept."""

from __future__ import annotations

import traceback

import pytest
from torch.distributed.checkpoint import CheckpointException

from distributed_at.engine.processes.failures import lost_rank, what_was_lost, write_failure

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.4]:2134. This is typically due to X"


def caused(cause: BaseException, *, explicit: bool) -> BaseException:
    """Return an error raised because of, or while handling, another."""
    try:
        try:
            raise cause
        except BaseException as first:
            if explicit:
                raise ValueError("no checkpoint") from first
            raise ValueError("no checkpoint")  # noqa: B904 - the implicit context is the point
    except ValueError as error:
        return error


@pytest.mark.parametrize("explicit", [True, False])
def test_a_lost_rank_is_recognised_behind_the_errors_that_it_caused(explicit):
    assert lost_rank(RuntimeError(CLOSED))
    assert lost_rank(caused(RuntimeError(CLOSED), explicit=explicit))
    assert lost_rank(CheckpointException("save", {1: (RuntimeError(CLOSED), traceback.StackSummary.from_list([]))}))
    assert not lost_rank(caused(RuntimeError("CUDA out of memory"), explicit=explicit))
    assert not lost_rank(ValueError(CLOSED))  # a message that quotes one


def test_what_was_lost_is_told_without_torchs_lines_and_advice():
    assert what_was_lost(RuntimeError(CLOSED)) == "Connection closed by peer [10.0.0.4]:2134"


def test_last_words_are_appended_by_rank_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SOME_TOKEN", "abcdefgh1234")
    for word in ("first", "second"):
        try:
            raise RuntimeError(f"{word} abcdefgh1234")
        except RuntimeError:
            path = write_failure(tmp_path / "log")
    assert path == tmp_path / "log" / "failure-rank3.txt"
    text = path.read_text()
    assert text.index("RuntimeError: first") < text.index("RuntimeError: second")
    assert "rank 3 on" in text
    assert "abcdefgh1234" not in text
