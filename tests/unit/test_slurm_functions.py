"""What the batch scripts do with a scheduler that answers, answers later, never, or cannot be asked."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

FUNCTIONS = Path(__file__).parents[2] / "slurm" / "functions.sh"


def asked(
    tmp_path: Path, scontrol: str | None, *, call: str = "code=85; requeue RUN", seconds: int = 3
) -> tuple[int, str]:
    """Run a function of the scripts with a ``scontrol`` of our own; return exit code and what was said."""
    tools = tmp_path / "tools"
    tools.mkdir()
    bodies = {"sleep": "exec /bin/sleep 0.2", "python": "echo 40"}
    if scontrol is not None:
        bodies["scontrol"] = f'echo "$@" >>{tmp_path}/asked\n{scontrol}'
    for name, body in bodies.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    for name in ("bash", "date", "sed", "grep", "cat", "wc"):
        (tools / name).symlink_to(next(p for p in (f"/bin/{name}", f"/usr/bin/{name}") if os.path.exists(p)))
    environ = {"PATH": str(tools), "PYTHON": "python", "SLURM_JOB_ID": "7", "ASK_SECONDS": str(seconds)}
    done = subprocess.run(
        [str(tools / "bash"), "-c", f"source {FUNCTIONS}; {call}"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


ANSWER = "[ $1 = requeue ] || echo '   JobState={} Reason=None Dependency=(null)'"
LATER = "[ $(wc -l <{asked}) -gt 3 ] || exit 1; " + ANSWER.format("RUNNING")


def test_running_job_is_requeued(tmp_path: Path) -> None:
    code, text = asked(tmp_path, ANSWER.format("RUNNING"))
    assert code == 85
    assert "requeued at step 40" in text
    assert (tmp_path / "asked").read_text().splitlines() == ["show job 7", "requeue 7"]


def test_controller_that_is_down_for_a_moment_is_asked_again(tmp_path: Path) -> None:
    code, text = asked(tmp_path, LATER.format(asked=tmp_path / "asked"), seconds=30)
    assert code == 85
    assert "requeued at step 40" in text
    assert (tmp_path / "asked").read_text().splitlines() == ["show job 7"] * 4 + ["requeue 7"]


def test_requeue_that_gets_no_answer_is_asked_for_again(tmp_path: Path) -> None:
    down = f"[ $1 = show ] || [ $(grep -c requeue {tmp_path}/asked) -gt 2 ] || exit 1; {ANSWER.format('RUNNING')}"
    code, _ = asked(tmp_path, down, seconds=30)
    assert code == 85
    assert (tmp_path / "asked").read_text().count("requeue 7") == 3


@pytest.mark.parametrize("scontrol", [None, "exit 1"], ids=["no scontrol", "no answer"])
def test_question_without_an_answer_is_not_taken_for_no(tmp_path: Path, scontrol: str | None) -> None:
    code, text = asked(tmp_path, scontrol)
    assert code == 85
    assert "the scheduler could not be asked by scontrol whether this job still runs. Nothing is lost" in text
    assert "the same sbatch command goes on at step 40" in text
    assert "cancelled" not in text


@pytest.mark.parametrize("state", ["CANCELLED", "PREEMPTED", "COMPLETING"])
def test_job_that_others_decided_about_is_left_to_them(tmp_path: Path, state: str) -> None:
    code, text = asked(tmp_path, ANSWER.format(state))
    assert code == 85
    assert "the job was cancelled, or the scheduler requeues it by itself" in text
    assert "requeue 7" not in (tmp_path / "asked").read_text()


def test_node_without_scontrol_is_told_at_the_start(tmp_path: Path) -> None:
    _, text = asked(tmp_path, None, call="is_finished() { false; }; train RUN recipe.yaml")
    assert "there is no scontrol on this node: this job cannot requeue itself" in text
    assert "slurm/chain.sh submits jobs that follow one another" in text
