"""One way from a run folder to accuracies and verdicts, and the events file alone says afterwards what was found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from distributed_at.config import ModelConfig
from distributed_at.data.sources import open_split
from distributed_at.engine.runs.evaluate_run import RunEvaluation, evaluate_run, subject_of
from distributed_at.engine.runs.evaluate_run import measure as measure_entries
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.engine.runs.weights import open_network
from distributed_at.engine.trainer import Trainer
from distributed_at.errors import CheckpointError
from distributed_at.float32 import tf32
from distributed_at.observe.events import read_events
from distributed_at.observe.record import load_run
from distributed_at.observe.tables import evaluation_rows
from distributed_at.observe.verdicts import run_verdicts
from distributed_at.observe.wandb import flatten
from distributed_at.recipes import load_recipe
from tests.integration.training import tiny, train

FINAL = (
    "evaluation.final=[{kind: clean}, {kind: pgd, name: pgd4, attack: {eps: 16, num_steps: 4, step_size: 6}, "
    "checkpoints: [2]}, {kind: autoattack, version: fast, attack: {eps: 16, num_steps: 1, step_size: 1}}]"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunEvaluation]:
    """A tiny run, evaluated while the training set cannot be opened."""
    folder = train(tiny(FINAL, "data.limit_test=48", "train.epochs=6"), tmp_path_factory.mktemp("runs") / "run")

    def test_images_alone(data, split, **options):
        assert split == "test", f"an evaluation of the test split opened {split}"
        return open_split(data, split, **options)

    with mock.patch("distributed_at.engine.runs.evaluate_run.open_split", test_images_alone):
        return folder, evaluate_run(folder)


def test_results_are_those_of_the_recipe_in_its_order(run: tuple[Path, RunEvaluation]) -> None:
    _, found = run
    assert [r.protocol.name for r in found.results] == ["clean", "pgd2", "pgd4", "AutoAttack-fast linf 16/255"]
    assert [r.total for r in found.results] == [48] * 4
    clean, few, more, auto = (r.correct for r in found.results)
    assert clean >= few >= more
    assert clean > auto


def test_clean_accuracy_is_the_one_counted_by_hand(run: tuple[Path, RunEvaluation]) -> None:
    """Images straight from scikit-learn: the test set is the last 360, of which the recipe takes the first."""
    folder, found = run
    network = open_network(RunFolder(folder), RunFolder(folder).load_config()).network
    rows = found.results[0].rows
    digits = load_digits()
    x = torch.from_numpy((digits.images[rows.sample_id] * 255 / 16).round()).float().div(255)
    with torch.no_grad():
        predictions = network(x[:, None].expand(-1, 3, -1, -1)).argmax(1).numpy()
    np.testing.assert_array_equal(rows.label, digits.target[rows.sample_id])
    np.testing.assert_array_equal(rows.clean_prediction, predictions)
    assert found.results[0].correct == int((predictions == digits.target[rows.sample_id]).sum())


def test_events_alone_say_what_was_measured_and_judged(run: tuple[Path, RunEvaluation], tmp_path: Path) -> None:
    folder, found = run
    (tmp_path / "copy").mkdir()
    shutil.copy(folder / "events.jsonl", tmp_path / "copy" / "events.jsonl")
    record = load_run(tmp_path / "copy")
    numbers = {m.protocol: (m.correct, m.total, m.hash, m.split) for m in record.measurements}
    assert numbers == {r.protocol.name: (r.correct, r.total, r.protocol.hash, "test") for r in found.results}
    assert {v.code for v in run_verdicts(record)} >= {
        v.code for v in found.verdicts if v.code != "no_better_than_guessing"
    }
    rows = {row["protocol"]: row["accuracy"] for row in evaluation_rows(record)}
    assert rows == {row["protocol"]: row["accuracy"] for row in evaluation_rows(folder)}


def test_mirrors_see_final_accuracies(run: tuple[Path, RunEvaluation]) -> None:
    folder, found = run
    sent: dict[str, float] = {}
    for row in read_events(folder):
        sent |= flatten(row)
    for result in found.results:
        assert sent[f"test/{result.protocol.name}/adv/accuracy"] == result.accuracy
    assert sent["train/step"] == 48


def test_verdicts_are_kept_and_those_of_the_last_evaluation_stand(
    tmp_path: Path, run: tuple[Path, RunEvaluation]
) -> None:
    """The rows of PGD-4 are made to say that it broke nothing, and are then put right again."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (place,) = (folder / "evaluations").glob("pgd-4-*")
    paths = list(place.glob("rows-*.jsonl"))
    before = {path: path.read_text() for path in paths}
    for path, text in before.items():
        path.write_text(text.replace('"correct_adv":false', '"correct_adv":true'))
    assert "stronger_attack_is_weaker" in {v.code for v in evaluate_run(folder).verdicts}
    assert "stronger_attack_is_weaker" in {v.code for v in load_run(folder).verdicts}
    for path, text in before.items():
        path.write_text(text)
    assert "stronger_attack_is_weaker" not in {v.code for v in evaluate_run(folder).verdicts}
    assert "stronger_attack_is_weaker" not in {v.code for v in load_run(folder).verdicts}
    assert len([r for r in read_events(folder) if r["event"] == "evaluation" and r["split"] == "test"]) == 4


def test_checkpoint_says_what_its_network_is(run: tuple[Path, RunEvaluation]) -> None:
    folder, found = run
    metadata = json.loads((found.checkpoint / "manifest.json").read_text())["metadata"]
    assert (metadata["num_classes"], metadata["image_size"]) == (10, 8)
    assert metadata["class_names"] == [str(n) for n in range(10)]
    saved = open_network(RunFolder(folder), RunFolder(folder).load_config())
    assert (saved.step, saved.epoch) == (48, 6.0)


def test_checkpoint_that_does_not_exist_is_named(run: tuple[Path, RunEvaluation]) -> None:
    with pytest.raises(CheckpointError, match="step_00000999"):
        evaluate_run(run[0], checkpoint="step_00000999")


def test_training_in_tf32_is_validated_and_evaluated_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[bool]] = {"training": set(), "validation": set(), "evaluation": set()}
    stepped = Trainer._micro_step

    def spy(phase: str):
        def measure(*arguments, **named):
            seen[phase].add(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
            return measure_entries(*arguments, **named)

        return measure

    def micro_step(self, *arguments, **named):
        seen["training"].add(torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32)
        return stepped(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "_micro_step", micro_step)
    monkeypatch.setattr("distributed_at.engine.validation.measure", spy("validation"))
    with tf32(False):
        held_out = ["data.validation_size=40", "evaluation.validation=[{kind: clean}]", "train.select=best_validation"]
        folder = train(tiny("train.precision=tf32", "train.epochs=1", *held_out), tmp_path / "run")
        monkeypatch.setattr("distributed_at.engine.runs.evaluate_run.measure", spy("evaluation"))
        evaluate_run(folder)
    assert seen == {"training": {True}, "validation": {False}, "evaluation": {False}}


def test_description_of_a_network_never_changes_by_itself() -> None:
    """Hashes of evaluations hold it: a field that is added, or another default, would make every one of them anew."""
    told = (
        '{"arch":"resnet18","blocks":null,"block":null,"base_width":64,"depth":null,"widen":null,"stem":"imagenet",'
        '"norm":"bn","groups":32,"bn_momentum":0.1,"bn_eps":0.00001,"sync_bn":false,"activation":"relu",'
        '"softplus_beta":1.0,"leaky_slope":0.01,"celu_alpha":1.2,"zero_init_gamma":false,"init":"default",'
        '"preact_shortcut":"activated","dropout":0.0,"pixel_mean":[0.0,0.0,0.0],"pixel_std":[1.0,1.0,1.0],'
        '"activation_checkpointing":false}'
    )
    config = load_recipe(
        "digits/adversarial.yaml", ["model={arch: resnet18, stem: imagenet, norm: bn, base_width: 64}"]
    )
    network = torch.nn.Linear(1, 1)
    assert ModelConfig(arch="resnet18").description == told
    assert json.loads(subject_of(network, config.config).description)["arch"] == "resnet18"
    assert subject_of(network, config.config).description == config.config.model.description
    other = ModelConfig(arch="torchvision:resnet18", options={"a": 1}, pretrained="w.pt")
    assert json.loads(other.description)["options"] == {"a": 1}
    assert json.loads(other.description)["pretrained"] == "w.pt"
