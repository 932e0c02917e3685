"""What is sure to end a run is said before a worker starts: by ``plan`` and ``train`` alike, with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from distributed_at.cli import main
from distributed_at.config import ModelConfig
from distributed_at.models.statistics import trains_on_one_image

RECIPE = """
name: small
data: {dataset: digits, image_size: 8, limit_train: 17, limit_test: 8}
model: {arch: resnet, blocks: BLOCKS, block: basic, stem: cifar, base_width: 4}
attack: {eps: 16, num_steps: 1, step_size: 16}
objective: {name: pgd_at}
optimizer: {name: sgd, lr: 0.01}
train: {epochs: 1, batch_size: 16, bn_group_size: 8, drop_last: false}
"""


def told(
    words: list[str], recipe: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    monkeypatch.chdir(folder)
    Path("small.yaml").write_text(recipe)
    code = main([*words[:1], "small.yaml", *words[1:]])
    found = capsys.readouterr()
    return code, " ".join((found.out + found.err).split())


@pytest.mark.parametrize("words", [["plan"], ["train", "--workers", "1"]])
def test_last_image_that_no_batch_norm_can_normalise_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = told(words, RECIPE.replace("BLOCKS", "[1, 1, 1, 1]"), tmp_path, capsys, monkeypatch)
    assert code == 2
    assert "the last batch of an epoch holds 1 of 17 images" in text
    assert "set train.drop_last=true or another train.batch_size" in text
    assert not (tmp_path / "runs").exists()


def test_last_image_that_can_be_normalised_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = told(["plan"], RECIPE.replace("BLOCKS", "[1, 1]"), tmp_path, capsys, monkeypatch)
    assert code == 0
    assert "warning [single_image_group]" in text


@pytest.mark.parametrize(
    ("fields", "image_size", "trains"),
    [
        ({"blocks": (1, 1, 1, 1)}, 8, False),
        ({"blocks": (1, 1, 1, 1)}, 16, True),
        ({"blocks": (1, 1, 1, 1), "norm": "gn", "groups": 2}, 8, True),
        ({"blocks": (1, 1)}, 8, True),
    ],
)
def test_network_that_one_image_can_train(fields: dict, image_size: int, trains: bool) -> None:
    config = ModelConfig.model_validate(
        {"arch": "resnet", "block": "basic", "stem": "cifar", "base_width": 4, **fields}
    )
    assert trains_on_one_image(config, num_classes=10, image_size=image_size) is trains


@pytest.mark.parametrize(
    ("dataset", "files"),
    [
        ("cifar10", "cifar-10-batches-py/ or cifar-10-batches-bin/"),
        ("cifar100", "cifar-100-python/ or cifar-100-binary/"),
        ("svhn", "train_32x32.mat and test_32x32.mat"),
    ],
)
def test_data_that_are_missing_are_told_with_the_way_to_get_them(
    dataset: str, files: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE.replace("BLOCKS", "[1, 1]").replace(
        "dataset: digits, image_size: 8", f"dataset: {dataset}, image_size: 32"
    )
    code, text = told(["train"], recipe, tmp_path, capsys, monkeypatch)
    assert code == 2
    assert f"give data.path=FOLDER, which holds {files}; with data.download=true" in text
