"""Any folder of class folders and any torchvision-style data set: opened, planned, trained, resumed and evaluated."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distributed_at.catalogue.datasets import DATASETS
from distributed_at.cli import main
from distributed_at.config import DataConfig, RunConfig
from distributed_at.data import open_split
from distributed_at.data.index import INDEX_NAME
from distributed_at.engine.runs.evaluate_run import evaluate_run
from distributed_at.errors import ConfigError, DataError
from distributed_at.planning import make_plan
from distributed_at.recipes import load_recipe
from tests.integration.training import TINY, cut_back, same_bits, tensors, train
from tests.training_kit import one_world

PACKAGE = Path(__file__).parents[2] / "distributed_at"
CLASSES = ("blue whale", "ant", "żółw", "3")  # any names; sorted, they are 3, ant, blue whale, żółw
WORDS = [word for word in TINY if not word.startswith(("data.", "evaluation=", "train="))]
WORDS += [
    "train={epochs: 2, batch_size: 8, bn_group_size: null, micro_batch_size: null, select: last}",
    "evaluation={every_epochs: null, validation: [], final: [{kind: clean}, {kind: pgd, attack: {eps: 8, num_steps: 1, step_size: 8}}]}",
    "log.every_steps=2",
]


def fill(folder: Path, each: int, *, seed: int = 0) -> Path:
    """Class folders with images of several sizes and formats; the class is told by the colour."""
    chance = np.random.default_rng(seed)
    for label, name in enumerate(sorted(CLASSES)):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            size = (int(chance.integers(10, 30)), int(chance.integers(10, 30)))
            pixels = chance.integers(0, 60, (*size, 3), dtype=np.uint8)
            pixels[..., label % 3] += np.uint8(60 * (label + 1) % 190)
            Image.fromarray(pixels).save(folder / name / f"{number}.{('png', 'jpg')[number % 2]}")
    return folder


def section(path: Path, **fields: object) -> DataConfig:
    return DataConfig(dataset="folder", path=str(path), image_size=8, backend="pil", **fields)


def test_train_and_val_of_any_classes_are_two_splits(tmp_path: Path) -> None:
    fill(tmp_path / "train", 5)
    fill(tmp_path / "val", 2, seed=1)
    train_split, test = (open_split(section(tmp_path), split, seed=0) for split in ("train", "test"))
    assert (train_split.num_samples, test.num_samples) == (20, 8)
    assert train_split.class_names == test.class_names == tuple(sorted(CLASSES))
    images, labels = test.read(test.sample_ids, epoch=0, train=False)
    assert tuple(images.shape) == (8, 3, 8, 8)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_one_folder_is_cut_into_the_same_two_parts_always(tmp_path: Path) -> None:
    fill(tmp_path / "all", 10)
    config = section(tmp_path / "all", test_size=12, validation_size=8)
    splits = {split: open_split(config, split, seed=7) for split in ("train", "validation", "test")}
    ids = {split: set(source.sample_ids.tolist()) for split, source in splits.items()}
    assert {split: len(found) for split, found in ids.items()} == {"train": 20, "validation": 8, "test": 12}
    assert ids["train"] | ids["validation"] | ids["test"] == set(range(40))
    assert set(open_split(config, "test", seed=8).sample_ids.tolist()) == ids["test"]
    moved = shutil.copytree(tmp_path / "all", tmp_path / "elsewhere")
    assert set(open_split(section(moved, test_size=12), "test", seed=0).sample_ids.tolist()) == ids["test"]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "no train/ and val/ in it: make both, or say by data.test_size"),
        ({"test_size": 40}, "leaves nothing to train on: .* has 40 images"),
        ({"test_size": 4, "num_classes": 7}, "has 4 classes: set num_classes: 4"),
    ],
)
def test_a_folder_that_says_too_little_is_told_what_is_missing(tmp_path: Path, fields: dict, told: str) -> None:
    fill(tmp_path / "all", 10)
    with pytest.raises((DataError, ConfigError), match=told):
        open_split(section(tmp_path / "all", **fields), "train", seed=0)


def test_a_test_size_beside_a_test_set_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train", 2)
    fill(tmp_path / "val", 2)
    with pytest.raises(ConfigError, match="has a test set of its own in val/"):
        open_split(section(tmp_path, test_size=2), "train", seed=0)
    with pytest.raises(ValueError, match="'cifar10' has a published test set"):
        DataConfig(dataset="cifar10", image_size=32, test_size=5)
    with pytest.raises(ValueError, match="download fetches cifar10, cifar100, svhn; 'folder' has to be brought"):
        DataConfig(dataset="folder", image_size=32, download=True)


def test_a_folder_is_planned_trained_resumed_and_evaluated(tmp_path: Path, capsys) -> None:
    fill(tmp_path / "all", 12)
    words = [
        *WORDS,
        f"data={{dataset: folder, path: '{tmp_path / 'all'}', test_size: 16, backend: pil, validation_size: 4}}",
    ]
    words += ["data.augment={crop: random_resized, flip: true}", "attack.target=none"]
    config = load_recipe("digits/adversarial.yaml", words).config
    plan = make_plan(config)
    assert (plan.num_train + config.data.validation_size, plan.num_test) == (32, 16)
    whole = train(config, tmp_path / "whole")
    last = max(int(p.name.removeprefix("step_")) for p in (whole / "checkpoints").glob("step_*"))
    again = train(config, cut_back(whole, tmp_path / "again", last // 2))
    assert all(same_bits(t, tensors(again, last)[name]) for name, t in tensors(whole, last).items())
    assert [result.total for result in evaluate_run(whole).results] == [16, 16]
    assert main(["report", str(whole)]) == 0
    assert "folder of images" in (whole / "report.html").read_text()


def test_evaluation_needs_the_test_images_alone_and_their_classes_to_be_the_ones_learned(tmp_path: Path) -> None:
    """The training images are deleted, then the test images' folders get other names."""
    fill(tmp_path / "all" / "train", 6)
    fill(tmp_path / "all" / "val", 3, seed=1)
    words = [*WORDS, f"data={{dataset: folder, path: '{tmp_path / 'all'}', backend: pil, validation_size: 4}}"]
    words += ["data.augment={crop: random_resized, flip: true}", "attack.target=none"]
    run = train(load_recipe("digits/adversarial.yaml", words).config, tmp_path / "run")
    shutil.rmtree(tmp_path / "all" / "train")
    with one_world():
        assert main(["eval", str(run), "--workers", "1"]) == 0
    assert [result.total for result in evaluate_run(run).results] == [12, 12]
    names = sorted(CLASSES)
    val = tmp_path / "all" / "val"
    (val / names[2]).rename(val / (names[2] + "x"))
    (val / INDEX_NAME).unlink()
    with pytest.raises(
        DataError,
        match=f"other classes than its network learned: other classes: without '{names[2]}' and with '{names[2]}x'",
    ):
        evaluate_run(run)
    shutil.rmtree(val / names[1])
    (val / INDEX_NAME).unlink()
    with pytest.raises(DataError, match=f"other classes: without '{names[1]}'"):
        evaluate_run(run)


def test_plan_counts_the_images_in_tar_shards(tmp_path: Path) -> None:
    fill(tmp_path / "all" / "train", 6)
    fill(tmp_path / "all" / "val", 3, seed=1)
    assert main(["data", "shard", str(tmp_path / "all"), str(tmp_path / "shards")]) == 0
    found = [make_plan(_recipe(tmp_path / name)) for name in ("all", "shards")]
    assert [(plan.num_train, plan.num_test) for plan in found] == [(24, 12), (24, 12)]
    assert found[0].statistics == found[1].statistics


def _recipe(path: Path) -> RunConfig:
    words = [*WORDS, f"data={{dataset: folder, path: '{path}', backend: pil, validation_size: 0}}"]
    words += ["data.augment={crop: random_resized, flip: true}", "attack.target=none"]
    return load_recipe("digits/adversarial.yaml", words).config


PLUGIN = '''
import numpy as np
from distributed_at.data.mapped import mapped
from distributed_at.catalogue.datasets import Dataset


class Blobs:
    """Torchvision's style: len() and [i] -> (image, label)."""

    classes = ["dark", "light"]

    def __init__(self, split):
        chance = np.random.default_rng(split == "test")
        self.labels = chance.integers(0, 2, 48 if split == "train" else 20)
        self.images = (self.labels[:, None, None, None] * 120 + chance.integers(0, 120, (len(self.labels), 8, 8, 3))).astype("uint8")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):
        return self.images[item], self.labels[item]


DATASETS = {"blobs": Dataset(title="Blobs", open=mapped(lambda path, split: Blobs(split)), train=48, test=20, classes=2)}
'''


@pytest.fixture
def blobs(tmp_path: Path):
    (tmp_path / "blobs.py").write_text(PLUGIN)
    (tmp_path / "mine.yaml").write_text(
        "extends: digits/adversarial.yaml\nname: mine\nplugins: [blobs.py]\ndata: {dataset: blobs, image_size: 8}\n"
    )
    yield tmp_path
    for name in [name for name in DATASETS if DATASETS.origin(name)]:
        DATASETS.remove(name)


def test_a_plugins_data_set_trains_resumes_and_is_evaluated(blobs: Path) -> None:
    words = [*WORDS, "data.validation_size=8", "attack.target=none"]
    config = load_recipe(str(blobs / "mine.yaml"), words).config
    assert make_plan(config).num_train == 40
    whole = train(config, blobs / "whole")
    last = max(int(p.name.removeprefix("step_")) for p in (whole / "checkpoints").glob("step_*"))
    again = train(config, cut_back(whole, blobs / "again", last // 2))
    assert all(same_bits(t, tensors(again, last)[name]) for name, t in tensors(whole, last).items())
    DATASETS.remove("blobs")
    line = [sys.executable, "-m", "distributed_at", "eval", str(whole), "--workers", "2", "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["total"] for row in json.loads(done.stdout)["rows"]][:2] == [20, 20]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ('astype("uint8")', 'astype("float32")', "of float32; give PIL images or uint8 arrays"),
        ("8, 8, 3)", "8, 9, 3)", r"shape \(8, 9, 3\), and data.image_size is 8"),
        ("classes=2", "classes=1", r"label 1 of item \d+ is outside 0 to 0"),
        ("48 if", "0 if", "holds no images"),
    ],
)
def test_what_a_data_set_gives_wrongly_is_told_with_the_item(blobs: Path, before: str, after: str, told: str) -> None:
    (blobs / "blobs.py").write_text(PLUGIN.replace(before, after))
    config = load_recipe(str(blobs / "mine.yaml"), ["data.validation_size=8"]).config
    with pytest.raises(DataError, match=told):
        open_split(config.data, "train", seed=0)


def test_nothing_but_its_entry_knows_a_data_set_by_name() -> None:
    """What a data set is stands in datasets.py and in its reader; everything else asks it."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                said = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                names = set(DATASETS.builtin) - {
                    "imagenet",
                    "folder",
                }  # a stem is called imagenet, a launcher's place folder
                assert not said & names, f"{path.relative_to(PACKAGE)}:{node.lineno}"
