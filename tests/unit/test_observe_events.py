"""What the events file promises: whole rows only, one history after restarts, valid JSON, no secrets, no exceptions."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest

from distributed_at.observe import events as events_module
from distributed_at.observe.encoding import to_json
from distributed_at.observe.events import EventLog, next_restart, read_events, select
from distributed_at.observe.secrets import REDACTED, redact


def write_train_rows(log: EventLog, steps: range, offset: float = 0.0) -> None:
    for step in steps:
        log.write("train", step=step, epoch=step / 10, loss=step + offset)


def test_torn_last_line_is_passed_over_and_the_next_row_is_whole(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        write_train_rows(log, range(3))
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event": "train", "step": 3, "lo')
    assert [row["step"] for row in read_events(tmp_path)] == [0, 1, 2]
    with EventLog(tmp_path, restart=1) as log:
        log.write("train", step=3, epoch=0.3, loss=1.0)
    assert [row["step"] for row in read_events(tmp_path)] == [0, 1, 2, 3]


def test_line_torn_inside_a_character_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes('{"event": "warning", "message": "ü'.encode()[:-1])
    assert read_events(tmp_path) == []


def test_rows_of_a_later_restart_replace_rows_of_the_same_step(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        write_train_rows(log, range(6))
    with EventLog(tmp_path, restart=1) as log:
        write_train_rows(log, range(3, 7), offset=100)
    rows = select(read_events(tmp_path), "train")
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["loss"] for row in rows] == [0, 1, 2, 103, 104, 105, 106]
    assert len(read_events(tmp_path, raw=True)) == 10


def test_rows_past_the_step_that_a_restart_went_back_to_are_undone(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        write_train_rows(log, range(10))
    with EventLog(tmp_path, restart=1) as log:
        log.write("restart", step=4, epoch=0.4)
        write_train_rows(log, range(5, 7), offset=100)
    assert [row["step"] for row in select(read_events(tmp_path), "train")] == [0, 1, 2, 3, 4, 5, 6]


def test_evaluations_of_one_step_stand_side_by_side(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        for protocol in ("clean", "pgd-10"):
            for branch in ("clean", "adv"):
                log.write(
                    "evaluation", step=5, epoch=1, protocol=protocol, branch=branch, split="validation", correct=1
                )
    assert len(read_events(tmp_path)) == 4


def test_every_start_of_a_run_stays_in_the_history(tmp_path: Path) -> None:
    for restart in range(3):
        assert next_restart(tmp_path) == restart
        with EventLog(tmp_path, restart=restart) as log:
            log.write("restart", step=0, epoch=0)
    assert len(read_events(tmp_path)) == 3


def test_nonfinite_numbers_make_valid_json_and_come_back_as_floats(tmp_path: Path) -> None:
    with EventLog(tmp_path) as log:
        log.write("train", step=1, epoch=0.1, loss=math.nan, terms={"adv": math.inf, "kl": -math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=refuse)
    assert line["loss"] == "NaN"
    (row,) = read_events(tmp_path)
    assert math.isnan(row["loss"])
    assert row["terms"] == {"adv": math.inf, "kl": -math.inf}


def test_numpy_and_paths_are_written_as_plain_values() -> None:
    found = to_json({"a": np.float32(0.5), "b": np.arange(3), "c": Path("x/y"), "d": np.bool_(True)})
    assert found == {"a": 0.5, "b": [0, 1, 2], "c": "x/y", "d": True}
    assert json.loads(json.dumps(to_json(object()))).startswith("<object")


def test_concurrent_reader_sees_only_whole_rows_in_order(tmp_path: Path) -> None:
    stop = threading.Event()
    seen: list[int] = []
    faults: list[str] = []

    def read() -> None:
        while not stop.is_set():
            rows = read_events(tmp_path, raw=True)
            steps = [row["step"] for row in rows]
            if steps != list(range(len(steps))) or any(row["text"] != "x" * 500 for row in rows):
                faults.append(f"{steps[-3:]}")
            seen.append(len(steps))

    thread = threading.Thread(target=read)
    thread.start()
    with EventLog(tmp_path) as log:
        for step in range(300):
            log.write("train", step=step, epoch=0, text="x" * 500)
    stop.set()
    thread.join()
    assert not faults
    assert len(read_events(tmp_path)) == 300


def test_several_writing_threads_do_not_mix_their_rows(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    threads = [
        threading.Thread(target=lambda n=n: [log.write("note", step=1000 * n + i, epoch=0) for i in range(50)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(read_events(tmp_path)) == 200


def test_rows_written_while_the_disk_refuses_arrive_when_it_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = events_module.os.write

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    log = EventLog(tmp_path)
    log.write("train", step=0, epoch=0)
    monkeypatch.setattr(events_module.os, "write", full)
    write_train_rows(log, range(1, 4))
    assert log.sync() is False
    monkeypatch.setattr(events_module.os, "write", real)
    log.write("train", step=4, epoch=0)
    log.close()
    assert [row["step"] for row in read_events(tmp_path)] == [0, 1, 2, 3, 4]
    assert sum("cannot be written" in message for message in caplog.messages) == 1


def test_row_cut_short_by_a_full_disk_is_written_again_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = events_module.os.write
    calls = []

    def short_once(descriptor: int, data: bytes) -> int:
        calls.append(1)
        return real(descriptor, data[:10] if len(calls) == 1 else data)

    monkeypatch.setattr(events_module.os, "write", short_once)
    log = EventLog(tmp_path)
    write_train_rows(log, range(3))
    log.close()
    assert [row["step"] for row in read_events(tmp_path)] == [0, 1, 2]


def test_folder_that_cannot_exist_never_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = EventLog(tmp_path / "file" / "run")
    log.write("train", step=0, epoch=0)
    assert log.sync() is False
    log.close()


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run", enabled=False)
    log.write("train", step=0, epoch=0)
    log.close()
    assert not (tmp_path / "run").exists()


def test_view_that_raises_is_dropped_and_rows_stay(tmp_path: Path) -> None:
    class Broken:
        calls = 0

        def on_event(self, row: object) -> None:
            Broken.calls += 1
            raise RuntimeError("screen gone")

        def close(self) -> None:
            raise RuntimeError("still gone")

    with EventLog(tmp_path, views=[Broken()]) as log:
        write_train_rows(log, range(30))
    assert Broken.calls == events_module.VIEW_FAILURES
    assert len(read_events(tmp_path)) == 30


def test_secrets_are_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef-very-secret")
    monkeypatch.setenv("MY_TOKEN", "tok-123456789")
    monkeypatch.setenv("BUCKET_SECRET", "hush-hush-hush")
    with EventLog(tmp_path) as log:
        log.write("warning", step=0, epoch=0, code="x", message="failed with 0123456789abcdef-very-secret in it")
        log.write("run_start", step=0, epoch=0, command=["train", "--api-key", "plainvalue1", "api_key=plainvalue2"])
        log.write("run_start", step=1, epoch=0, env={"HUB_TOKEN": "plainvalue3", "a": "tok-123456789 hush-hush-hush"})
        log.write("run_start", step=2, epoch=0, url="https://me:plainvalue4@host/path")
    text = (tmp_path / "events.jsonl").read_text()
    for secret in ("very-secret", "tok-123456789", "hush-hush", *(f"plainvalue{n}" for n in range(1, 5))):
        assert secret not in text
    assert len(read_events(tmp_path)) == 4


def test_redaction_leaves_ordinary_words_alone() -> None:
    ordinary = {
        "message": "monkey business: step 3/10, loss=1.5",
        "keyboard": "qwerty",
        "num_tokens": 5,
        "protocol": "pgd",
    }
    assert redact(ordinary, ()) == ordinary
    assert redact({"api_key": "x"}, ()) == {"api_key": REDACTED}
