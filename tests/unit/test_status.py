"""Where a run stands, read from its folder alone, and what the SLURM files make of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed_at import errors
from distributed_at.cli import main
from distributed_at.engine.checkpoint.files import Manifest, hash_file, write_manifest
from distributed_at.engine.runs.lock import RunLock
from distributed_at.engine.runs.status import run_status

ROOT = Path(__file__).parents[2]


def write_events(folder: Path, *rows: tuple[str, int, dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"event": kind, "step": step, "time": float(n), **fields})
        for n, (kind, step, fields) in enumerate(rows)
    ]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_checkpoint(folder: Path, step: int, content: bytes = b"numbers") -> Path:
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / ".metadata").write_bytes(content)
    write_manifest(path, Manifest(step, 1, {".metadata": hash_file(path / ".metadata")}, {}, {}, time.time()))
    return path


STARTED = ("run_start", 0, {"total_steps": 40})
TRAINED = ("train", 12, {"total_steps": 40})


def test_folder_that_is_not_there_was_not_started(tmp_path: Path) -> None:
    status = run_status(tmp_path / "no")
    assert (status.started, status.finished, status.checkpoint_step, status.running) == (False, False, 0, False)
    assert "train" in status.advice


@pytest.mark.parametrize(
    ("end", "finished", "what"),
    [
        (("run_end", 40, {"reason": "finished"}), True, "done"),
        (("run_end", 20, {"reason": "early"}), True, "done"),
        (("run_end", 20, {"reason": "collapsed"}), True, "done"),
        (("run_end", 20, {"reason": "stopped"}), False, "again"),
        (None, False, "crash"),
    ],
)
def test_end_of_the_last_start_decides(tmp_path: Path, end: tuple | None, finished: bool, what: str) -> None:
    rows = [STARTED, TRAINED, *([end] if end else [])]
    status = run_status(write_events(tmp_path, *rows))
    assert (status.finished, status.exit_class, status.total_steps) == (finished, what, 40)
    assert status.step == (end[1] if end else 12)


def test_restart_after_the_end_makes_the_run_unfinished(tmp_path: Path) -> None:
    """Earlier rows, and rows that only look like an end, do not count: the last start does."""
    write_events(
        tmp_path,
        STARTED,
        ("run_end", 40, {"reason": "finished"}),
        ("restart", 20, {}),
        ("warning", 20, {"code": "x", "message": '"event": "run_end", "reason": "finished"'}),
    )
    assert not run_status(tmp_path).finished


def test_spacing_of_the_events_file_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(
        '{"event":"run_start","step":0}\n{"reason":"finished","event":"run_end","step":3}\n{"torn'
    )
    assert run_status(tmp_path).finished


def test_newest_good_checkpoint_is_named_and_bad_ones_with_their_reason(tmp_path: Path) -> None:
    write_events(tmp_path, STARTED)
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20)
    cut = write_checkpoint(tmp_path, 30)
    (cut / ".metadata").write_bytes(b"num")
    (tmp_path / "checkpoints" / "step_00000040").mkdir()
    status = run_status(tmp_path)
    assert (status.checkpoint, status.checkpoint_step) == ("step_00000020", 20)
    assert set(status.bad_checkpoints) == {"step_00000030", "step_00000040"}
    assert "3 bytes" in status.bad_checkpoints["step_00000030"]


def test_verify_reads_every_byte(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20).joinpath(".metadata").write_bytes(b"nxmbers")
    assert run_status(tmp_path).checkpoint_step == 20
    assert run_status(tmp_path, verify=True).checkpoint_step == 10


def test_no_good_checkpoint_needs_a_person(tmp_path: Path) -> None:
    write_events(tmp_path, STARTED)
    write_checkpoint(tmp_path, 10).joinpath(".metadata").unlink()
    assert run_status(tmp_path).exit_class == "person"


def test_live_holder_of_the_lock_is_told_from_a_dead_one(tmp_path: Path) -> None:
    write_events(tmp_path, STARTED)
    with RunLock(tmp_path):
        status = run_status(tmp_path)
        assert (status.running, status.exit_class) == (True, "wait")
        assert str(os.getpid()) in str(status.holder)
        held = (tmp_path / "lock").read_text()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "lock").write_text(json.dumps({**json.loads(held), "pid": gone.pid, "started": "1"}))
    status = run_status(tmp_path)
    assert (status.running, status.exit_class) == (False, "crash")
    assert "its process is gone" in str(status.holder)


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (0, "done"),
        (85, "again"),
        (2, "person"),
        (3, "person"),
        (4, "person"),
        (5, "person"),
        (6, "crash"),
        (137, "crash"),
        (1, "crash"),
    ],
)
def test_exit_code_says_what_follows_whatever_the_folder_holds(tmp_path: Path, code: int, what: str) -> None:
    write_events(tmp_path, STARTED, ("run_end", 40, {"reason": "finished"}))
    assert run_status(tmp_path, exit_code=code).exit_class == what == errors.exit_class(code)


def test_every_user_error_has_a_class_of_its_own() -> None:
    """A new kind of error must say whether a scheduler may start the run again."""
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.UserError)]
    assert {e.exit_code for e in kinds} <= {*errors.EXIT_CLASSES, errors.EXIT_HANG}


def test_verb_prints_one_document_or_one_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_events(tmp_path / "r152", STARTED, ("run_end", 40, {"reason": "finished"}))
    write_checkpoint(tmp_path / "r152", 20)
    assert main(["status", "r152", "--runs", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] is True
    for field, text in (("finished", "true"), ("checkpoint_step", "20"), ("holder", "null"), ("exit_class", "done")):
        assert main(["status", str(tmp_path / "r152"), "--get", field]) == 0
        assert capsys.readouterr().out == text + "\n"
    assert main(["status", "r152", "--get", "finised"]) == errors.EXIT_CONFIG
    assert "Did you mean 'finished'?" in capsys.readouterr().err
    assert main(["status", str(tmp_path / "r152" / "events.jsonl")]) == errors.EXIT_CONFIG


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (85, "requeued at step 20"),
        (2, "exit code 2 needs a person"),
        (5, "exit code 5 needs a person"),
        (137, "crash 1 at step 20"),
    ],
)
def test_sbatch_functions_ask_the_verb(tmp_path: Path, code: int, said: str) -> None:
    """The scheduler's commands are stand-ins; what the functions decide is real."""
    folder = write_events(tmp_path / "run", STARTED)
    write_checkpoint(folder, 20)
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, line in (("scontrol", "echo JobState=RUNNING"), ("sinfo", ":"), ("sleep", ":"), ("date", "echo now")):
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    script = f'source slurm/functions.sh; is_finished "$1" && echo finished; code={code}; finish "$1"'
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": "7",
    }
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code
    assert said in done.stdout
    assert not done.stdout.startswith("finished")
