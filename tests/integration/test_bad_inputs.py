"""Mistakes of users: one clear message, the right exit code, no traceback, nothing left on disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from distributed_at.cli import main
from tests.patience import run

DIGITS = ["train", "digits/adversarial.yaml", "--workers", "1"]


def _write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def _typo_recipe(folder: Path) -> list[str]:
    return ["train", _write(folder / "mine.yaml", "extends: digits/adversarial.yaml\nattack: {num_stepz: 7}\n")]


def _broken_yaml(folder: Path) -> list[str]:
    return ["train", _write(folder / "mine.yaml", "extends: digits/adversarial.yaml\nattack: {num_steps: 7\n")]


def _cycle(folder: Path) -> list[str]:
    _write(folder / "b.yaml", "extends: a.yaml\n")
    return ["train", _write(folder / "a.yaml", "extends: b.yaml\n")]


def _empty_cifar(folder: Path) -> list[str]:
    (folder / "cifar").mkdir()
    return ["train", "cifar/smoke.yaml", f"data.path={folder / 'cifar'}", "--workers", "1"]


def _empty_imagenet(folder: Path) -> list[str]:
    (folder / "images" / "train").mkdir(parents=True)
    return ["train", "imagenet/smoke.yaml", f"data.path={folder / 'images'}", "--workers", "1"]


def _no_data_path(folder: Path) -> list[str]:
    return ["train", "cifar/smoke.yaml", f"data.path={folder / 'nowhere'}", "--workers", "1"]


def _other_recipe(folder: Path) -> list[str]:
    _write(folder / "runs" / "digits-adversarial" / "recipe.yaml", "extends: digits/adversarial.yaml\nseed: 5\n")
    return DIGITS


def _no_checkpoint(folder: Path) -> list[str]:
    _write(folder / "runs" / "empty" / "recipe.yaml", "extends: digits/adversarial.yaml\nname: empty\n")
    return ["checkpoint", "verify", str(folder / "runs" / "empty" / "checkpoints" / "step_00000010")]


# name -> (arguments from a folder, exit code, phrases that the message must hold)
CASES = {
    "unknown verb": (lambda f: ["trian"], 2, ["'trian'", "Did you mean 'train'?"]),
    "unknown option": (lambda f: [*DIGITS, "--worker-count", "2"], 2, ["--worker-count", "Did you mean '--workers'?"]),
    "unknown recipe": (lambda f: ["train", "digits/adversarail.yaml"], 2, ["digits/adversarail.yaml", "digits/adversarial.yaml"]),
    "unknown row": (lambda f: ["train", "cifar/bag_of_tricks/baselines.yaml#resnet18-trian"], 2, ["resnet18-trian", "resnet18-train"]),
    "typo in a file": (_typo_recipe, 2, ["mine.yaml:2", "num_stepz", "num_steps"]),
    "broken yaml": (_broken_yaml, 2, ["mine.yaml"]),
    "cycle of extends": (_cycle, 2, ["a.yaml", "b.yaml"]),
    "typo in an override": (lambda f: [*DIGITS, "optimiser.lr=0.1"], 2, ["optimiser", "optimizer"]),
    "wrong type": (lambda f: [*DIGITS, "optimizer.lr=fast"], 2, ["optimizer.lr", "fast", "number"]),
    "out of range": (lambda f: [*DIGITS, "optimizer.momentum=1.5"], 2, ["optimizer.momentum", "1.5", "less than 1"]),
    "unknown choice": (lambda f: [*DIGITS, "model.norm=batch"], 2, ["model.norm", "batch", "bn"]),
    "eps in wrong units": (lambda f: [*DIGITS, "attack.eps=0.2"], 2, ["eps", "/255", "51"]),
    "frozen statistics that attacks move": (
        lambda f: [*DIGITS, "train.freeze_bn_from_epoch=2", "attack.bn_mode=train"],
        2,
        ["attack.bn_mode 'train'", "train.freeze_bn_from_epoch", "use attack.bn_mode 'eval' or 'batch'"],
    ),
    "dropout": (lambda f: [*DIGITS, "model.dropout=0.3"], 2, ["dropout belongs to arch 'wide_resnet'", "got 0.3"]),
    "milestone past the end": (
        lambda f: [*DIGITS, "schedule.name=piecewise", "schedule.milestones=[40]"], 2, ["milestones", "40", "30"],
    ),
    "targeted loss with trades": (
        lambda f: [*DIGITS, "objective.name=trades", "attack.loss=kl", "attack.target=random_other"], 2, ["target"],
    ),
    "workers that do not divide": (
        lambda f: ["train", "digits/adversarial.yaml", "--workers", "3"], 2, ["world size 3", "128", "2 and 4"],
    ),
    "workers that are no number": (lambda f: ["train", "digits/adversarial.yaml", "--workers", "two"], 2, ["--workers", "two"]),
    "batch larger than the data": (lambda f: [*DIGITS, "train.batch_size=4096"], 2, ["batch_size", "4096"]),
    "selection without held-out images": (lambda f: [*DIGITS, "data.validation_size=0"], 2, ["validation_size"]),
    "absent data": (_no_data_path, 2, ["nowhere", "cifar"]),
    "empty data": (_empty_cifar, 2, ["cifar-10-batches-py"]),
    "image folder without images": (_empty_imagenet, 2, ["images"]),
    "another recipe in the run folder": (_other_recipe, 2, ["seed", "5", "0"]),
    "unknown run": (lambda f: ["eval", "digits-advresarial"], 2, ["digits-advresarial", "no run"]),
    "overriding what was trained": (
        lambda f: ["eval", str(f / "held"), "optimizer.lr=1"], 2, ["optimizer.lr", "evaluation."],
    ),
    "unknown GPU": (lambda f: ["plan", "digits/adversarial.yaml", "--gpu", "h2000"], 2, ["h2000", "h200"]),
    "absent checkpoint": (_no_checkpoint, 2, ["step_00000010", "no run folder"]),
}  # fmt: skip


def run_case(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    build, _, _ = CASES[name]
    _write(folder / "held" / "recipe.yaml", "extends: digits/adversarial.yaml\nname: held\n")
    words = build(folder)
    before = sorted(folder.rglob("*"))
    try:
        code = main(words)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert sorted(folder.rglob("*")) == before, "a mistake left something on disk"
    return code, capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_gets_one_clear_message_and_leaves_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    _, wanted_code, phrases = CASES[name]
    code, message = run_case(name, tmp_path, capsys)
    assert code == wanted_code, message
    assert "distributed-at: error: " in message
    assert "Traceback" not in message
    for phrase in phrases:
        assert phrase in message, message


def test_help_and_mistakes_answer_without_importing_torch(tmp_path):
    program = "import sys; from distributed_at.cli import main\ntry: main(['trian'])\nexcept SystemExit: print('torch' in sys.modules)"
    answer = run([sys.executable, "-c", program], cwd=tmp_path)
    assert answer.stdout.strip() == "False"


def test_json_of_a_listing_is_one_document_on_stdout(capsys):
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    row = next(r for r in rows if r["ref"] == "cifar/bag_of_tricks/baselines.yaml#resnet18-train")
    assert set(row) == {"ref", "paper", "table", "row", "numbers", "description"}
    assert np.isclose(row["numbers"]["aa"], 48.51)  # Bag of tricks, Table 7


def test_what_plan_warns_of_stands_in_the_events_of_the_training_and_is_said(tmp_path, capfd):
    from distributed_at.engine.batching import BatchPlan
    from distributed_at.plan_warnings import plan_warnings
    from tests.integration.training import tiny, train

    config = tiny("attack.num_steps=0", "train.epochs=0.25")
    plan = BatchPlan.resolve(batch_size=8, world_size=1, micro_batch_size=None, bn_group_size=None)
    warned = [
        (w.code, w.message)
        for w in plan_warnings(config, plan, num_train=64, has_batch_norm=True)
        if w.level == "warning"
    ]
    assert "attack_does_nothing" in dict(warned)
    rows = [json.loads(line) for line in (train(config, tmp_path / "run") / "events.jsonl").read_text().splitlines()]
    assert [(row["code"], row["message"]) for row in rows if row["event"] == "warning"] == warned
    err = capfd.readouterr().err
    assert all(f"warning: {code}: {message}" in err for code, message in warned)
