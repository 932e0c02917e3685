"""Near-duplicates of a test set are found exactly, the best-scored images of each class stay, and a kill loses no block."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from distributed_at.cli import main
from distributed_at.config import ExtraConfig
from distributed_at.data.duplicates import NearTest
from distributed_at.data.extra import open_extra
from distributed_at.data.packed import PackedImages
from distributed_at.data.selection import best_of_each_class
from distributed_at.data.unlabelled import open_unlabelled
from distributed_at.engine.runs import pseudolabel as module
from distributed_at.errors import ConfigError, DataError
from distributed_at.recipes import load_recipe


def by_hand(images: np.ndarray, test: np.ndarray, within: float) -> np.ndarray:
    """Return the distances pair by pair, in float64."""
    both = np.concatenate([test, test[:, :, ::-1]]).astype(np.float64)
    found = [np.sqrt(((both - image) ** 2).mean(axis=(1, 2, 3))).min() for image in images.astype(np.float64)]
    return np.where(np.array(found) <= within, found, np.inf)


@pytest.mark.parametrize("size", [8, 9, 5])
@pytest.mark.parametrize("within", [0.0, 6.0, 40.0, 255.0])
def test_distances_to_the_test_set_are_those_of_all_pairs(size, within, monkeypatch):
    monkeypatch.setattr("distributed_at.data.duplicates._CHUNK", 7)
    monkeypatch.setattr("distributed_at.data.duplicates._PAIRS", 5)
    draw = np.random.default_rng(0)
    smooth = np.repeat(draw.integers(0, 256, (12, 1, 1, 3)), size, 1).repeat(size, 2)
    test = np.clip(smooth + draw.integers(-20, 21, (12, size, size, 3)), 0, 255).astype(np.uint8)
    near = np.clip(test[:9].astype(int) + draw.integers(-8, 9, (9, size, size, 3)), 0, 255).astype(np.uint8)
    images = np.concatenate([near[:, :, ::-1], test[3:5], draw.integers(0, 256, (6, size, size, 3), dtype=np.uint8)])
    distances, which = NearTest(test, within=within).distances(images)
    expected = by_hand(images, test, within)
    np.testing.assert_allclose(distances, expected, rtol=1e-6)
    np.testing.assert_array_equal(which >= 0, np.isfinite(expected))
    assert which[9:11].tolist() == [3, 4]
    if within == 6.0:
        assert which[:9].tolist() == list(range(9))  # mirrored and noisy, and found


def test_of_each_class_the_highest_scores_stay():
    labels = np.array([0, 1, 0, 1, 0, 1, 0, 1, 0])
    scores = np.array([0.1, 0.9, 0.8, 0.9, 0.8, 0.2, 0.8, 0.9, 0.99], dtype=np.float32)
    assert best_of_each_class(labels, scores, 4, 2, field="x").tolist() == [1, 2, 3, 8]  # of equal scores the earlier
    eligible = np.ones(9, dtype=bool)
    eligible[[1, 8]] = False
    assert best_of_each_class(labels, scores, 4, 2, field="x", eligible=eligible).tolist() == [2, 3, 4, 7]
    with pytest.raises(ConfigError, match=r"x 5 is not a multiple of 2 classes.*the nearest is 4"):
        best_of_each_class(labels, scores, 5, 2, field="x")
    with pytest.raises(ConfigError, match="takes 5 images of each class, and class 1 has 4: use at most 8"):
        best_of_each_class(labels, scores, 10, 2, field="x")


class Brightness(torch.nn.Module):
    """Says class k of an image whose red is 25 * k, the surer the brighter its green; counts what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        red, green = (x[:, c].mean(dim=(1, 2)) * 255 for c in (0, 1))
        return torch.nn.functional.one_hot((red / 25).round().long(), 10) * (1 + green[:, None] / 50)


@pytest.fixture
def classifier(tmp_path, monkeypatch):
    """A run folder whose network is ``Brightness``, and 600 images whose classes and scores are known."""
    config = load_recipe("digits/adversarial.yaml", []).config
    network = Brightness()
    monkeypatch.setattr(module, "RunFolder", lambda path: SimpleNamespace(load_config=lambda: config))
    monkeypatch.setattr(
        module, "open_network", lambda *args, **kwargs: SimpleNamespace(network=network, path=tmp_path / "step_1")
    )
    monkeypatch.setattr(module, "_BLOCK", 128)
    monkeypatch.setattr("distributed_at.data.extra_files.ROWS", 50)
    draw = np.random.default_rng(0)
    images = np.zeros((600, 8, 8, 3), dtype=np.uint8)
    images[..., 0] = (25 * draw.integers(0, 10, 600))[:, None, None]
    images[..., 1] = draw.permutation(600)[:, None, None] % 256
    images[..., 2] = 255  # no digit: those are grey
    np.savez(tmp_path / "candidates.npz", image=images)
    return network, images


def test_labels_scores_and_kept_images_are_the_classifiers(tmp_path, classifier):
    _, images = classifier
    manifest = module.pseudolabel(tmp_path, [tmp_path / "candidates.npz"], tmp_path / "set", keep=200)
    packed = PackedImages(tmp_path / "set")
    labels, greens = images[:, 0, 0, 0] // 25, images[:, 0, 0, 1].astype(int)
    expected = []
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        expected += rows[np.argsort(-greens[rows], kind="stable")][:20].tolist()
    expected.sort()
    np.testing.assert_array_equal(packed.read(np.arange(200)), images[expected])
    np.testing.assert_array_equal(packed.labels(np.arange(200)), labels[expected])
    logits = 1 + greens[expected] / 50
    np.testing.assert_allclose(packed.all_scores(), np.exp(logits) / (np.exp(logits) + 9), rtol=1e-4)
    assert manifest.counts == dict.fromkeys(range(10), 20)
    assert manifest.made_by["candidates"] == 600
    # a smaller set of the same scores is chosen by a recipe
    config = ExtraConfig(files=(str(tmp_path / "set"),), labelled_ratio=0.5, keep=100)
    smaller = open_extra(config, num_classes=10, image_size=8)
    assert len(smaller) == 100
    best = [i for k in range(10) for i in [e for e in expected if labels[e] == k]]
    chosen = sorted(
        e for k in range(10) for e in sorted((b for b in best if labels[b] == k), key=lambda b: (-greens[b], b))[:10]
    )
    np.testing.assert_array_equal(smaller.read(np.arange(100)), images[chosen])
    assert (
        smaller.identity().content
        != open_extra(config.model_copy(update={"keep": None}), num_classes=10, image_size=8).identity().content
    )


def test_test_images_among_the_candidates_are_left_out(tmp_path, classifier):
    from distributed_at.data import open_split

    config = load_recipe("digits/adversarial.yaml", []).config
    test = open_split(config.data, "test", seed=0)
    theirs = test.read(test.sample_ids[:30], epoch=0, train=False)[0].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "theirs.npz", image=np.concatenate([theirs[:15], theirs[15:, :, ::-1]]))
    paths = [tmp_path / "theirs.npz", tmp_path / "candidates.npz"]
    manifest = module.pseudolabel(tmp_path, paths, tmp_path / "set")
    assert (manifest.images, manifest.made_by["near_duplicates"]) == (600, 30)
    with pytest.raises(DataError, match="all 30 images are near-duplicates"):
        module.pseudolabel(tmp_path, paths[:1], tmp_path / "other")


def test_an_interrupted_labelling_goes_on_at_its_block(tmp_path, classifier, monkeypatch):
    network, _ = classifier
    paths = [tmp_path / "candidates.npz"]
    whole = module.pseudolabel(tmp_path, paths, tmp_path / "whole", keep=200)
    network.seen = 0
    with pytest.MonkeyPatch.context() as patch:
        write = module._write_block

        def interrupted(path, block):
            if path.name == "block-000003.npz":
                raise KeyboardInterrupt
            write(path, block)

        patch.setattr(module, "_write_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module.pseudolabel(tmp_path, paths, tmp_path / "parts", keep=200)
    assert network.seen == 4 * 128
    assert module.pseudolabel(tmp_path, paths, tmp_path / "parts", keep=200).digest == whole.digest
    assert network.seen == 4 * 128 + 600 - 3 * 128
    module.pseudolabel(tmp_path, paths, tmp_path / "parts", keep=200)
    assert network.seen == 4 * 128 + 600 - 3 * 128
    network.weight.data += 1  # another classifier: its scores are its own
    with pytest.raises(ConfigError, match="packed from other files"):
        module.pseudolabel(tmp_path, paths, tmp_path / "parts", keep=200)
    assert network.seen > 1000


def test_a_folder_of_image_files_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "b").mkdir()
    colours = {"b/2.png": (10, 20, 30), "a.bmp": (40, 50, 60), "b/1.png": (70, 80, 90)}
    for name, colour in colours.items():
        Image.new("RGB", (16, 8) if name == "a.bmp" else (8, 8), colour).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = open_unlabelled([tmp_path], image_size=8)
    images = np.concatenate(list(found.pieces()))
    assert images.shape == (3, 8, 8, 3)
    assert images[:, 0, 0].tolist() == [[40, 50, 60], [70, 80, 90], [10, 20, 30]]
    assert np.concatenate(list(found.pieces(2)))[:, 0, 0].tolist() == [[10, 20, 30]]
    (tmp_path / "b" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png: cannot be decoded"):
        list(open_unlabelled([tmp_path], image_size=8).pieces())


def test_what_cannot_be_labelled_is_refused(tmp_path, classifier, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no packed set and no image file"):
        open_unlabelled([tmp_path / "empty"], image_size=8)
    with pytest.raises(DataError, match="its images have 8 pixels, the network takes 32"):
        open_unlabelled([tmp_path / "candidates.npz"], image_size=32)
    np.savez(tmp_path / "named.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="holds no 'image'"):
        open_unlabelled([tmp_path / "named.npz"], image_size=8)
    words = ["data", "pseudolabel", str(tmp_path), str(tmp_path / "candidates.npz"), "--output", str(tmp_path / "o")]
    assert main([*words, "--keep", "0"]) == 2
    assert "--keep must be at least 1" in capsys.readouterr().err
    assert main([*words, "--duplicates-within", "300"]) == 2
    assert "0 to 255, got 300" in capsys.readouterr().err
