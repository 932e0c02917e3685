"""A stop signal to the launcher, or to any one rank, through the real command: saved, exit 85, and resumed to the same end."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distributed_at.engine.processes.launch import free_port
from distributed_at.errors import EXIT_REQUEUE
from tests.patience import end_of, wait_until
from tests.training_kit import RECIPE, TINY, checkpoint_step, state_digest, training_rows, with_words

WORDS = ["train", str(RECIPE), *with_words(TINY, "train.epochs=60"), "--quiet"]  # 180 steps
LAUNCHER = [sys.executable, "-m", "distributed_at", *WORDS, "--workers", "2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "distributed_at", *WORDS]


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if command is TORCHRUN:
        command = [*command[:4], f"--master-port={free_port()}", *command[4:]]
    with open(f"{folder}.err", "a") as errors:
        words = [*command, "--run-folder", str(folder)]
        return subprocess.Popen(words, env=environment, stderr=errors, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str], folder: Path) -> tuple[int, str]:
    return end_of(process), Path(f"{folder}.err").read_text()


def wait_rows(process: subprocess.Popen[str], folder: Path, number: int) -> None:
    path = folder / "events.jsonl"
    begun = lambda: path.exists() and path.read_bytes().count(b"\n") >= number  # noqa: E731
    wait_until(lambda: begun() or process.poll() is not None, f"{number} events", processes=[process.pid])
    assert begun(), Path(f"{folder}.err").read_text()


def rank_process(folder: Path, rank: int) -> int:
    """Process id of a rank of the run in ``folder``."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (path / "cmdline").read_bytes(), (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(folder).encode() in words and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError(f"no rank {rank}")


def last_event(folder: Path) -> dict:
    return json.loads((folder / "events.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    code, errors = finish(start(LAUNCHER, folder), folder)
    assert code == 0, errors
    return folder


def stopped_and_resumed(command: list[str], folder: Path, undisturbed: Path, stop) -> int:
    process = start(command, folder)
    wait_rows(process, folder, 20)
    stop(process)
    code, errors = finish(process, folder)
    step = checkpoint_step(folder)
    assert 0 < step < 180, errors
    assert last_event(folder)["reason"] == "stopped"
    assert last_event(folder)["step"] == step
    again, errors = finish(start(command, folder), folder)
    assert again == 0, errors
    assert training_rows(folder) == training_rows(undisturbed)
    assert state_digest(folder) == state_digest(undisturbed)
    return code


def in_terminal(words: list[str]) -> tuple[int, int]:
    """Start a command as a terminal's own session; return its process id and our side of the terminal."""
    process, ours = pty.fork()
    if not process:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests may ignore it, as nohup does
        os.execve(words[0], words, {**os.environ, "OMP_NUM_THREADS": "1"})
    return process, ours


def test_closed_terminal_is_a_request_to_stop_and_the_run_saves(tmp_path):
    folder = tmp_path / "run"
    # it prints on the terminal that goes, and is not at its end by then
    words = with_words([word for word in LAUNCHER if word != "--quiet"], "train.epochs=6000")
    process, terminal = in_terminal([*words, "--run-folder", str(folder)])
    path = folder / "events.jsonl"
    wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= 8, "8 events", processes=[process])
    os.close(terminal)
    code: list[int] = []

    def ended() -> bool:
        found, status = os.waitpid(process, os.WNOHANG)
        code.extend([os.waitstatus_to_exitcode(status)] if found else [])
        return bool(found)

    wait_until(ended, "the launcher's end")
    assert code == [EXIT_REQUEUE], (folder / "log").exists() and [p.read_text() for p in (folder / "log").iterdir()]
    assert 0 < checkpoint_step(folder) < 18000
    assert last_event(folder)["reason"] == "stopped"


@pytest.mark.slow
def test_run_under_nohup_outlives_its_terminal(tmp_path):
    folder = tmp_path / "run"
    process = start(["nohup", *with_words(LAUNCHER, "train.epochs=6000")], folder)
    wait_rows(process, folder, 5)
    process.send_signal(signal.SIGHUP)
    os.kill(rank_process(folder, 1), signal.SIGHUP)
    wait_rows(process, folder, 25)
    process.send_signal(signal.SIGTERM)
    assert finish(process, folder)[0] == EXIT_REQUEUE
    assert last_event(folder)["step"] >= 20


@pytest.mark.slow
def test_ranks_of_an_evaluation_end_with_their_launcher(tmp_path):
    folder = tmp_path / "run"
    assert finish(start(with_words(LAUNCHER[:-1], "1", "train.epochs=3"), folder), folder)[0] == 0
    words = [
        sys.executable,
        "-m",
        "distributed_at",
        "eval",
        str(folder),
        "--workers",
        "2",
        "evaluation.final.1.attack.num_steps=100000",
    ]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True)
    assert process.stderr is not None
    while "clean" not in process.stderr.readline():
        assert process.poll() is None
    ranks = [rank_process(folder, rank) for rank in range(2)]
    process.kill()
    process.wait()
    gone = lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks)  # noqa: E731
    wait_until(gone, "the end of both ranks")


@pytest.mark.slow
def test_term_to_the_launcher_saves_and_the_same_command_ends_as_if_undisturbed(undisturbed, tmp_path):
    code = stopped_and_resumed(LAUNCHER, tmp_path / "run", undisturbed, lambda p: p.send_signal(signal.SIGTERM))
    assert code == EXIT_REQUEUE


@pytest.mark.slow
def test_usr1_to_one_rank_stops_all_ranks_at_one_step(undisturbed, tmp_path):
    folder = tmp_path / "run"
    stop = lambda _: os.kill(rank_process(folder, 1), signal.SIGUSR1)  # noqa: E731
    assert stopped_and_resumed(LAUNCHER, folder, undisturbed, stop) == EXIT_REQUEUE


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "rank"])
def test_torchrun_passes_the_signal_on_and_its_ranks_save(to, undisturbed, tmp_path):
    folder = tmp_path / "run"

    def stop(process: subprocess.Popen[str]) -> None:
        if to == "launcher":
            process.send_signal(signal.SIGTERM)
        else:
            os.kill(rank_process(folder, 0), signal.SIGTERM)

    assert stopped_and_resumed(TORCHRUN, folder, undisturbed, stop) != 0  # torchrun has its own exit code


@pytest.mark.slow
def test_second_term_leaves_at_once_without_waiting_for_the_step(tmp_path):
    folder = tmp_path / "run"
    process = start(LAUNCHER, folder)
    wait_rows(process, folder, 5)
    os.kill(rank_process(folder, 1), signal.SIGSTOP)  # so that the step never ends
    process.send_signal(signal.SIGTERM)
    time.sleep(4)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    os.kill(rank_process(folder, 1), signal.SIGKILL)
    code, _ = finish(process, folder)
    assert code in (143, 137)
