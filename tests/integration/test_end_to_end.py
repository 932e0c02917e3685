"""The commands that a user types, with two real workers on real digits: train, resume, eval, report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_at.cli import main
from tests.patience import run
from tests.training_kit import one_world

SHORT = [
    "train.epochs=6",
    "schedule.warmup_epochs=1",
    "attack.num_steps=3",
    "checkpoint.every_epochs=2",
    "evaluation.every_epochs=2",
]


def command(*words: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", **environ}
    return run([sys.executable, "-m", "distributed_at", *words], cwd=cwd, env=env)


def succeeded(*words: str, cwd: Path) -> str:
    done = command(*words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    succeeded("train", "digits/adversarial.yaml", "--workers", "2", "name=robust", *SHORT, cwd=folder)
    return folder


def events(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs" / name / "events.jsonl").read_text().splitlines()]


def test_training_leaves_the_documented_run_folder(folder):
    held = {p.name for p in (folder / "runs" / "robust").iterdir()}
    assert {"recipe.yaml", "environment.json", "events.jsonl", "checkpoints", "evaluations", "log"} <= held


def test_robust_accuracy_on_held_out_images_rises(folder):
    rounds = [e for e in events(folder, "robust") if e["event"] == "evaluation" and e["protocol"]["name"] == "pgd7"]
    assert rounds[-1]["accuracy"] > rounds[0]["accuracy"]
    assert rounds[-1]["low"] > 0.2, "held-out robust accuracy is not above chance"


def test_the_parts_of_a_step_add_up_to_its_wall_time(folder):
    for row in (e for e in events(folder, "robust") if e["event"] == "train"):
        assert sum(row["seconds"].values()) == pytest.approx(row["wall_seconds"], rel=0.03)


@pytest.mark.slow
def test_the_same_command_on_a_finished_run_changes_nothing(folder):
    before = sorted(p.name for p in (folder / "runs" / "robust" / "checkpoints").iterdir())
    succeeded("train", "digits/adversarial.yaml", "--workers", "2", "name=robust", *SHORT, cwd=folder)
    assert sorted(p.name for p in (folder / "runs" / "robust" / "checkpoints").iterdir()) == before
    trained = [e["step"] for e in events(folder, "robust") if e["event"] == "train"]
    assert trained == sorted(set(trained)), "steps were trained twice"


def test_the_saved_recipe_runs_identically(folder):
    shown = succeeded("recipes", "show", "runs/robust/recipe.yaml", cwd=folder)
    assert shown == (folder / "runs" / "robust" / "recipe.yaml").read_text()


def test_eval_counts_every_test_image_once_and_report_shows_its_numbers(folder):
    document = json.loads(succeeded("eval", "robust", "--workers", "2", "--only", "clean,pgd20", "--json", cwd=folder))
    rows = document["rows"]
    assert document["verdicts"] == []
    by_name = {row["protocol"]: row for row in rows if row["split"] == "test"}
    assert by_name["clean"]["total"] == by_name["pgd20"]["total"] == 360
    assert by_name["pgd20"]["correct"] < by_name["clean"]["correct"]
    assert main(["report", str(folder / "runs" / "robust")]) == 0
    page = (folder / "runs" / "robust" / "report.html").read_text()
    assert f"{100 * by_name['pgd20']['accuracy']:.2f}" in page


def test_finished_work_exits_0_on_a_terminal_without_utf_8(folder):
    for words in (("eval", "robust", "--workers", "2", "--only", "clean"), ("report", "robust"), ("status", "robust")):
        done = command(*words, cwd=folder, PYTHONIOENCODING="ascii")
        assert done.returncode == 0, done.stderr
        assert (done.stdout + done.stderr).isascii()


def test_eval_names_the_worst_case_and_what_is_suspicious(folder, monkeypatch, capsys):
    """Three attacks on one ball; then the rows of the strongest are made to say that it broke less than the others."""
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}.items():  # a worker, that starts none itself
        monkeypatch.setenv(name, str(value))
    attacks = [f"{{kind: pgd, name: pgd{n}, attack: {{eps: 48, num_steps: {n}, step_size: 16}}}}" for n in (2, 3, 4)]
    command = ["eval", str(folder / "runs" / "robust"), f"evaluation.final=[{', '.join(attacks)}]"]

    def evaluate(*options: str) -> str:
        with one_world():
            assert main([*command, *options]) == 0
        return capsys.readouterr().out

    document = json.loads(evaluate("--json"))
    by_name = {row["protocol"]: row for row in document["rows"]}
    worst = by_name["worst of pgd2 + pgd3 + pgd4"]
    assert worst["correct"] <= min(by_name[f"pgd{n}"]["correct"] for n in (2, 3, 4))
    assert (worst["total"], worst["metric"], worst["branch"]) == (360, "worst_case_accuracy", "adv")
    assert document["verdicts"] == []
    place = next(p.parent for p in folder.rglob("protocol.json") if by_name["pgd4"]["hash"] in p.read_text())
    for path in place.glob("rows-*.jsonl"):
        path.write_text(path.read_text().replace('"correct_adv":false', '"correct_adv":true'))
    verdicts = json.loads(evaluate("--json"))["verdicts"]
    assert [v["code"] for v in verdicts][:1] == ["attack_breaks_nothing"]  # which the rows say now, too
    (verdict, *_) = [v for v in verdicts if v["code"] == "stronger_attack_is_weaker"]
    assert verdict["numbers"]["stronger"] == 1
    shown = evaluate()
    assert "worst of pgd2 + pgd3 + pgd4" in " ".join(shown.split())
    assert f"suspicious [stronger_attack_is_weaker]: {verdict['message']}" in shown


def test_the_checkpoints_verify(folder):
    rows = json.loads(succeeded("checkpoint", "verify", "robust", "--json", cwd=folder))
    assert rows
    assert all(row["state"] == "good" for row in rows)
