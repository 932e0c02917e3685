"""A run knows its data: other data on a rank, at a resume or in an evaluation are refused, mapped by name, or marked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from distributed_at.cli import main
from distributed_at.config import RunConfig
from distributed_at.data import open_split
from distributed_at.data.index import INDEX_NAME
from distributed_at.data.source import ImageSource, Relabelled
from distributed_at.engine.run import run_training
from distributed_at.engine.runs.evaluate_run import evaluate_run
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.errors import ConfigError, DataError
from distributed_at.recipes import dump_yaml, load_recipe
from tests.distributed.launch import run_ranks
from tests.integration.test_any_data import CLASSES, WORDS, fill
from tests.integration.training import cut_back, train

NAMES = sorted(CLASSES)


def words(path: Path, *more: str) -> list[str]:
    data = (
        f"data={{dataset: folder, path: '{path}', backend: pil, validation_size: 0, augment: {{crop: random_resized}}}}"
    )
    return [*WORDS, data, "attack.target=none", "checkpoint={every_steps: 2, asynchronous: false}", *more]


def config(path: Path, *more: str) -> RunConfig:
    return load_recipe("digits/adversarial.yaml", words(path, *more)).config


@pytest.fixture
def data(tmp_path: Path) -> Path:
    fill(tmp_path / "data" / "train", 6)
    fill(tmp_path / "data" / "val", 3, seed=1)
    return tmp_path / "data"


def events(run: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def without_indexes(folder: Path) -> None:
    for index in folder.rglob(INDEX_NAME):
        index.unlink()


def rank_of_other_data(root: str) -> str:
    """Train on two ranks, of which the second one's node has renamed class folders; return the refusal."""
    import torch.distributed as dist

    real: Callable[..., ImageSource] = open_split

    def own(data, split, **options):
        if dist.get_rank() == 1:
            data = data.model_copy(update={"path": f"{root}/other"})
        return real(data, split, **options)

    with mock.patch("distributed_at.data.training.open_split", own):
        try:
            run_training(config(Path(root) / "data"), RunFolder(Path(root) / "run"), quiet=True)
        except ConfigError as error:
            return str(error)
    return "trained"


def test_a_rank_that_sees_other_data_ends_all_before_the_first_step(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "other")
    for part in ("train", "val"):
        (tmp_path / "other" / part / NAMES[0]).rename(tmp_path / "other" / part / "zebra")
    told = run_ranks(rank_of_other_data, 2, str(tmp_path))
    assert told[0] == told[1]
    assert "rank 1 on " in told[0]
    assert f"other classes: without '{NAMES[0]}' and with 'zebra'" in told[0]
    assert not events(tmp_path / "run", "train")


def test_a_resumed_run_refuses_other_data_unless_they_are_accepted(data: Path, tmp_path: Path) -> None:
    whole = train(config(data), tmp_path / "whole")
    run = cut_back(whole, tmp_path / "run", 2)
    for part in ("train", "val"):  # the class sorts elsewhere: every label moves
        (data / part / NAMES[0]).rename(data / part / "zebra")
    without_indexes(data)
    with pytest.raises(
        ConfigError, match=r"not those that this run began with: other classes: without .* --accept-data"
    ):
        train(config(data), run)
    assert len(events(run, "run_end")) == len(events(whole, "run_end"))
    train(config(data), run, accept_data=True)
    warnings = [row["message"] for row in events(run, "warning") if row["code"] == "data_changed"]
    assert [part for part in ("train", "test") if any(f"split '{part}'" in text for text in warnings)] == [
        "train",
        "test",
    ]
    assert all("with 'zebra'" in text for text in warnings)


def test_an_unchanged_folder_that_is_indexed_anew_or_moved_is_the_same_data(data: Path, tmp_path: Path) -> None:
    run = cut_back(train(config(data), tmp_path / "whole"), tmp_path / "run", 2)
    without_indexes(data)
    train(config(data), run)
    assert not [row for row in events(run, "warning") if row["code"] == "data_changed"]


def test_rows_of_other_images_under_the_same_names_are_never_reused(data: Path, tmp_path: Path) -> None:
    """B has as many images with the same names, sizes and class names; they are black."""
    run = train(config(data, "train.epochs=12", "evaluation.final=[{kind: clean}]"), tmp_path / "run")
    (first,) = evaluate_run(run).results
    other = shutil.copytree(data, tmp_path / "other")
    without_indexes(other)
    for file in (other / "val").rglob("*.*g"):
        from PIL import Image

        Image.new("RGB", Image.open(file).size).save(file)
    changed = load_recipe(str(run / "recipe.yaml"), [f"data.path={other}"]).config
    found = evaluate_run(run, config=changed)
    (second,) = found.results
    assert second.protocol.hash != first.protocol.hash
    assert second.correct == 3  # one image after another gets the same answer
    assert "other_data" in [verdict.code for verdict in found.verdicts]
    assert ["other_data" in row for row in events(run, "evaluation")] == [False, True]
    assert evaluate_run(run).results[0].correct == first.correct
    shutil.copytree(run, tmp_path / "fresh", ignore=shutil.ignore_patterns("evaluations"))
    assert evaluate_run(tmp_path / "fresh", config=changed).results[0].correct == 3


def test_classes_in_another_order_are_mapped_by_their_names(data: Path, tmp_path: Path) -> None:
    run = train(config(data, "train.epochs=12", "evaluation.final=[{kind: clean}]"), tmp_path / "run")
    (first,) = evaluate_run(run).results
    real: Callable[..., ImageSource] = open_split

    def reversed_labels(*arguments, **options):
        source = real(*arguments, **options)
        return Relabelled(source, tuple(reversed(source.class_names)))

    with mock.patch("distributed_at.engine.runs.evaluate_run.open_split", reversed_labels):
        (second,) = evaluate_run(run).results
    with real(config(data).data, "test", seed=0) as source:
        turned = Relabelled(source, tuple(reversed(source.class_names)))
        ids = source.sample_ids
        assert turned.read(ids, epoch=0, train=False)[1].tolist() == [3 - label for label in source.labels(ids)]
        assert turned.labels(ids).tolist() == [3 - label for label in source.labels(ids)]
    assert second.protocol.hash != first.protocol.hash  # computed anew
    assert np.array_equal(second.rows.label, first.rows.label)
    assert second.correct == first.correct


def test_weights_of_other_classes_are_refused_to_begin_with(data: Path, tmp_path: Path) -> None:
    run = train(config(data), tmp_path / "first")
    (data / "train" / NAMES[1]).rename(data / "train" / "zebra")
    (data / "val" / NAMES[1]).rename(data / "val" / "zebra")
    without_indexes(data)
    for source in (run, run / "checkpoints" / "step_00000002"):
        with pytest.raises(ConfigError, match=r"other classes than its network learned: other classes: without"):
            train(config(data, f"train.init_from={source}"), tmp_path / f"second-{source.name}")


def test_test_images_are_looked_at_before_the_first_step(data: Path, tmp_path: Path) -> None:
    """ILSVRC's own layout has no class folders in val."""
    for folder in list((data / "val").iterdir()):
        for image in folder.iterdir():
            image.rename(data / "val" / f"{folder.name}-{image.name}")
        folder.rmdir()
    with pytest.raises(DataError, match="found none and 12 loose images; move each image into the folder of its class"):
        train(config(data), tmp_path / "run")
    assert not (tmp_path / "run" / "events.jsonl").exists() or not events(tmp_path / "run", "train")


def test_a_class_without_images_is_an_error_in_training_and_a_warning_in_test(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in (data / "val" / NAMES[2]).iterdir():
        image.unlink()
    run = train(config(data), tmp_path / "run")
    (warning,) = [row for row in events(run, "warning") if row["code"] == "classes_without_test_images"]
    assert f"no test image of 1 of 4 classes, e.g. '{NAMES[2]}'" in warning["message"]
    for image in (data / "train" / NAMES[2]).iterdir():
        image.unlink()
    without_indexes(data)
    (tmp_path / "mine.yaml").write_text(dump_yaml(config(data)))
    assert main(["train", str(tmp_path / "mine.yaml"), "--run-folder", str(tmp_path / "second")]) == 2
    assert f"no training image of 1 of 4 classes, e.g. '{NAMES[2]}'" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()
