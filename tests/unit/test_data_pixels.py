"""What a split shows, against the data read directly and against other libraries' image code."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from scipy import stats
from scipy.io import savemat
from sklearn.datasets import load_digits, load_sample_image
from torchvision.transforms.functional import InterpolationMode, resized_crop

from distributed_at.config import AugmentConfig, DataConfig
from distributed_at.data import open_split
from distributed_at.data.augment import Views, centre_views, random_resized_views
from distributed_at.data.cifar import read_cifar
from distributed_at.data.colour import jitters
from distributed_at.data.imagenet_dali import DaliDecoder
from distributed_at.data.imagenet_pil import PilDecoder
from distributed_at.data.index import survey
from distributed_at.data.machine import dali_installed
from distributed_at.data.order import StepOrder
from distributed_at.data.resample import resample
from distributed_at.data.source import ArraySource

NO_DALI = pytest.mark.skipif(not dali_installed(), reason="no DALI")
BACKENDS = ["pil", pytest.param("dali_cpu", marks=NO_DALI)]
SIZE = 48


def digits(split: str, *, seed: int = 0, **options: object) -> ArraySource:
    return open_split(DataConfig(dataset="digits", image_size=8, **options), split, seed=seed)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_digits_are_scikit_learns_pixel_by_pixel_with_its_labels(split: str) -> None:
    theirs = load_digits()
    augment = AugmentConfig(crop="pad", pad=2, flip=True, colour_jitter=True)  # of training views alone
    with digits(split, validation_size=100, augment=augment) as source:
        images, labels = source.read(source.sample_ids, epoch=3, train=False)
        assert not torch.equal(source.read(source.sample_ids, epoch=3, train=True)[0], images)
    for place, sample in enumerate(source.sample_ids):
        for channel in images[place].tolist():
            assert channel == [[int(255 * v / 16 + 0.5) for v in row] for row in theirs.images[sample]]
        assert labels[place] == theirs.target[sample]


def test_held_out_images_are_the_same_for_every_seed_of_the_run() -> None:
    """Else a run that goes on from another one's weights would be judged on images that those were trained on."""
    held = [digits("validation", seed=seed, validation_size=100).sample_ids.tolist() for seed in (0, 7)]
    assert held[0] == held[1]
    for seed in (0, 7):
        assert not set(held[0]) & set(digits("train", seed=seed, validation_size=100).sample_ids.tolist())
    other = digits("validation", validation_size=100, validation_seed=1).sample_ids.tolist()
    assert other != held[0]


def test_each_split_of_svhn_is_read_from_its_own_file(tmp_path: Path) -> None:
    written = {}
    for number, split in enumerate(("train", "test")):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3, 9), dtype=np.uint8)
        labels = np.random.default_rng(number).integers(1, 11, 9)
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": labels[:, None].astype(np.uint8)})
        written[split] = pixels, labels
    for split, (pixels, labels) in written.items():
        with open_split(DataConfig(dataset="svhn", path=str(tmp_path), image_size=32), split, seed=0) as source:
            images, found = source.read(source.sample_ids, epoch=0, train=False)
        for k in range(9):
            assert torch.equal(images[k], torch.from_numpy(pixels[..., k]).permute(2, 0, 1))
            assert int(found[k]) == (0 if labels[k] == 10 else labels[k])


def test_classes_of_cifar_100_have_their_own_names(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rows = np.zeros((2, 3072), dtype=np.uint8)
    content = {b"data": rows, b"fine_labels": [3, 9], b"coarse_labels": [1, 0]}
    (folder / "test").write_bytes(pickle.dumps(content, 2))
    names = {b"fine_label_names": [b"apple", b"ray"], b"coarse_label_names": [b"fish", b"fruit"]}
    (folder / "meta").write_bytes(pickle.dumps(names, 2))
    assert read_cifar(tmp_path, "cifar100", "test")[2] == ("apple", "ray")


def test_description_changes_with_the_labels() -> None:
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    shared = {"name": "digits", "split": "test", "sample_ids": np.arange(4), "num_classes": 10, "seed": 0}
    sources = [
        ArraySource(images, np.array(y), augment=AugmentConfig(), **shared) for y in ([0, 1, 2, 3], [0, 1, 3, 2])
    ]
    assert sources[0].describe() != sources[1].describe()


def test_batch_that_divides_the_epoch_leaves_no_empty_step() -> None:
    order = StepOrder(100, 10, seed=0, drop_last=False)
    assert order.steps_per_epoch == 10
    assert [len(order.ids(0, step)) for step in range(10)] == [10] * 10


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of real photographs in two classes: pieces of scikit-learn's two, without loss."""
    root = tmp_path_factory.mktemp("photographs")
    for split in ("train", "val"):
        for number, name in enumerate(("china.jpg", "flower.jpg")):
            picture = Image.fromarray(load_sample_image(name))
            folder = root / split / f"n{number}"
            folder.mkdir(parents=True)
            for k in range(6):
                left, top = 80 * k, 30 * k + (10 if split == "val" else 0)
                picture.crop((left, top, left + 120 + 8 * k, top + 150 - 9 * k)).save(folder / f"{k}.png")
    return root


def folder_split(root: Path, split: str, backend: str, *, seed: int = 0, **augment: object):
    data = {"dataset": "imagenet", "path": str(root), "image_size": SIZE, "resize_size": 56, "num_threads": 1}
    return open_split(DataConfig(backend=backend, augment=AugmentConfig(**augment), **data), split, seed=seed)


def file_of(root: Path, split: str, sample: int) -> Image.Image:
    return Image.open(sorted((root / split).glob("*/*.png"))[sample])


@pytest.mark.parametrize("backend", BACKENDS)
def test_about_half_of_a_folders_training_images_are_mirrored_left_to_right(photographs: Path, backend: str) -> None:
    mirrored = 0
    with folder_split(photographs, "train", backend, crop="none", flip=True) as source:
        upright, _ = source.read(source.sample_ids, epoch=0, train=False)
        turned = torch.stack(
            [
                torch.from_numpy(np.array(Image.fromarray(x).transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
                for x in upright.permute(0, 2, 3, 1).numpy()
            ]
        ).permute(0, 3, 1, 2)
        for epoch in range(8):
            shown, _ = source.read(source.sample_ids, epoch=epoch, train=True)
            for k, image in enumerate(shown):
                assert torch.equal(image, upright[k]) != torch.equal(image, turned[k])
                mirrored += torch.equal(image, turned[k])
    assert stats.binomtest(mirrored, 8 * 12).pvalue > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_crops_of_a_folder_are_what_torchvision_cuts_and_resizes(photographs: Path, backend: str) -> None:
    with folder_split(photographs, "train", backend, crop="random_resized", seed=3) as source:
        ids = source.sample_ids
        shown, labels = source.read(ids, epoch=5, train=True)
    pictures = [file_of(photographs, "train", i) for i in ids]
    assert labels.tolist() == [0] * 6 + [1] * 6
    widths, heights = np.array([p.size for p in pictures]).T
    windows = random_resized_views(ids, heights, widths, epoch=5, seed=3, size=SIZE).windows
    for image, picture, (top, left, height, width) in zip(shown, pictures, windows.tolist(), strict=True):
        theirs = resized_crop(picture, top, left, height, width, [SIZE, SIZE], InterpolationMode.BICUBIC)
        difference = np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs).astype(int))
        assert difference.mean() < 0.2
        assert np.asarray(theirs).std() > 10, "the comparison needs pictures with content"


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_sees_no_colour_jitter(photographs: Path, backend: str) -> None:
    read = []
    for jitter in (False, True):
        with folder_split(photographs, "test", backend, colour_jitter=jitter) as source:
            read.append(source.read(source.sample_ids, epoch=0, train=False)[0])
    assert torch.equal(*read)


def test_labels_are_places_among_sorted_classes_however_the_disk_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["n10", "n02", "n30", "n21"]
    for name in names:
        (tmp_path / name).mkdir()
        for k in (2, 0, 1):
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{k}.png")
    listed = os.scandir
    for backwards in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr("os.scandir", lambda path, r=backwards: sorted(listed(path), key=lambda e: e.name, reverse=r))
            index = survey(tmp_path, num_threads=1)
        assert index.class_names == ("n02", "n10", "n21", "n30")
        assert index.paths == tuple(f"{name}/{k}.png" for name in sorted(names) for k in range(3))
        assert index.labels.tolist() == [label for label in range(4) for _ in range(3)]


def test_held_out_images_of_a_folder_are_training_files(photographs: Path) -> None:
    config = DataConfig(
        dataset="imagenet", path=str(photographs), image_size=SIZE, resize_size=SIZE, validation_size=4,
        backend="pil", num_threads=1, augment=AugmentConfig(),
    )  # fmt: skip
    with open_split(config, "validation", seed=0) as held, open_split(config, "train", seed=0) as train:
        images, labels = held.read(held.sample_ids, epoch=0, train=False)
        assert sorted([*held.sample_ids.tolist(), *train.sample_ids.tolist()]) == list(range(12))
    for sample, image, label in zip(held.sample_ids.tolist(), images, labels.tolist(), strict=True):
        picture = file_of(photographs, "train", sample)
        scale = SIZE / min(picture.size)
        resized = picture.resize([round(scale * edge) for edge in picture.size], Image.Resampling.BICUBIC)
        left, top = ((edge - SIZE) // 2 for edge in resized.size)
        theirs = np.asarray(resized.crop((left, top, left + SIZE, top + SIZE))).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - theirs).mean() < 0.2
        assert label == sample // 6


# cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC) of OpenCV 5.0.0 on the image below
OPENCV = {
    (5, 4): [[23, 196, 30, 162], [94, 146, 185, 142], [111, 100, 192, 181], [124, 152, 185, 64], [100, 173, 74, 152]],
    (8, 9): [
        [0, 35, 113, 182, 97, 11, 80, 163, 214],
        [10, 73, 173, 249, 154, 71, 182, 134, 42],
        [134, 64, 39, 144, 207, 199, 146, 144, 165],
        [117, 115, 103, 78, 172, 220, 89, 151, 255],
        [49, 172, 237, 94, 154, 233, 136, 108, 123],
        [103, 140, 169, 145, 193, 210, 122, 63, 45],
        [154, 94, 84, 198, 168, 68, 28, 100, 188],
        [32, 147, 231, 155, 62, 64, 205, 193, 119],
    ],
}


@pytest.mark.parametrize("size", OPENCV)
def test_opencv_kernel_gives_opencvs_pixels(size: tuple[int, int]) -> None:
    image = np.array([[(37 * i * i + 91 * j + 13 * i * j) % 256 for j in range(6)] for i in range(7)], dtype=np.uint8)
    side = max(size)
    views = Views(
        windows=np.array([[0, 0, 7, 6]]), resized=np.array([size]), corners=np.array([[0, 0]]),
        flips=np.array([False]), size=side,
    )  # fmt: skip
    out = np.zeros((*size, 3), dtype=np.uint8)
    resample(np.repeat(image[:, :, None], 3, axis=2), views, 0, out, resize="opencv")
    assert np.abs(out.astype(int) - np.array(OPENCV[size])[:, :, None]).max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_folders_kernel_is_the_recipes_and_its_protocols_name_it(photographs: Path, backend: str) -> None:
    shown, told = {}, {}
    for resize in ("antialiased", "opencv"):
        config = DataConfig(dataset="imagenet", path=str(photographs), image_size=SIZE, backend=backend, resize=resize)
        with open_split(config, "test", seed=0) as source:
            shown[resize] = source.read(source.sample_ids, epoch=0, train=False)[0].float()
            told[resize] = source.describe()["interpolation"]
    gap = (shown["antialiased"] - shown["opencv"]).abs().mean().item()
    assert gap > 0.5
    assert told == {"antialiased": "bicubic, antialiased", "opencv": "bicubic as OpenCV's, not antialiased"}


def test_opencv_kernel_is_refused_where_nothing_would_use_it() -> None:
    with pytest.raises(ValidationError, match="resize is the kernel of image folders; 'cifar10' is not resized by it"):
        DataConfig(dataset="cifar10", image_size=32, resize="opencv")
    with pytest.raises(ValidationError, match="resize 'opencv' is a kernel of the CPU decoders"):
        DataConfig(dataset="imagenet", image_size=8, resize="opencv", backend="dali_gpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_image_far_into_a_batch_is_told_at_its_own_place(backend: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(load_sample_image("flower.jpg")[:40, :40]).save(buffer, "PNG")
    encoded = [np.frombuffer(buffer.getvalue(), dtype=np.uint8)] * 300
    encoded[280] = encoded[280][:100]
    decoder = PilDecoder(num_threads=1) if backend == "pil" else DaliDecoder(size=8, num_threads=1)
    images, failures = decoder.decode(
        encoded, centre_views(np.full(300, 40), np.full(300, 40), shortest_edge=8, size=8)
    )
    decoder.close()
    assert list(failures) == [280]
    assert not images[280].any()
    for place in (0, 24, 255, 256, 299):
        assert torch.equal(images[place], images[1])
    assert images[1].any()


def test_every_place_of_a_random_crop_is_as_likely_the_last_one_too() -> None:
    count = 8000
    views = random_resized_views(
        np.arange(count),
        np.full(count, 30),
        np.full(count, 30),
        epoch=0,
        seed=0,
        size=8,
        area=(0.25, 0.25),
        aspect=(1, 1),
    )
    assert (views.windows[:, 2:] == 15).all()
    for axis in (0, 1):
        places = np.bincount(views.windows[:, axis], minlength=16)
        assert len(places) == 16
        assert stats.chisquare(places).pvalue > 1e-4


def test_aspects_of_random_crops_are_uniform_and_inverted_half_of_the_time() -> None:
    count, low, high = 40_000, 0.4, 2.5
    views = random_resized_views(
        np.arange(count), np.full(count, 1000), np.full(count, 1000), epoch=0, seed=0, size=8, area=(0.2, 0.3),
        aspect=(low, high),
    )  # fmt: skip
    height, width = views.windows[:, 2:].T
    uniform = stats.uniform(low, high - low)
    assert stats.kstest(width / height, lambda a: (uniform.cdf(a) + uniform.sf(1 / a)) / 2).pvalue > 1e-4


def test_lighting_follows_imagenets_principal_colours() -> None:
    """Krizhevsky et al. 2012, section 4.1: the shift is P diag(l) a, so its covariance is P diag(l^2) P' times 0.1^2."""
    values = np.array([0.2175, 0.0188, 0.0045])
    components = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    expected = (0.1 * 255) ** 2 * sum(v**2 * np.outer(c, c) for v, c in zip(values, components.T, strict=True))
    shifts = np.array([one.shift for one in jitters(np.arange(20_000), epoch=0, seed=1)])
    np.testing.assert_allclose(np.cov(shifts.T), expected, rtol=0.05)
    assert np.linalg.eigvalsh(np.cov(shifts.T))[1] == pytest.approx((25.5 * values[1]) ** 2, rel=0.05)
