"""ImageNet-style folders through both decoders: the same pixels, and damaged files are named and replaced."""

import io
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from distributed_at.config import AugmentConfig, DataConfig
from distributed_at.data import build_index, choose_backend, load_index, open_index, open_split
from distributed_at.data.index import INDEX_NAME, index_path
from distributed_at.data.machine import dali_installed
from distributed_at.errors import ConfigError, DataError

BACKENDS = [
    "pil",
    pytest.param("dali_cpu", marks=pytest.mark.skipif(not dali_installed(), reason="DALI not installed")),
]
SIZES = [(120, 160), (160, 107), (96, 96), (75, 200), (331, 250), (64, 48), (40, 41), (90, 240)]


def _photo(height, width, seed):
    """An image with a photograph's statistics: noise whose amplitude falls with frequency, and some hard edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / max(height, width)
    channels = []
    common = rng.normal(size=(height, width))
    for _ in range(3):
        noise = np.fft.rfft2(0.8 * common + 0.4 * rng.normal(size=(height, width))) / frequency
        values = np.fft.irfft2(noise, s=(height, width))
        channels.append(128 + 50 * (values - values.mean()) / values.std())
    image = np.stack(channels, axis=-1)
    y, x = rng.integers(0, height // 2), rng.integers(0, width // 2)
    image[y : y + height // 3, x : x + width // 3] = rng.integers(0, 256, 3)
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def _encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _write_folder(root, per_class=8):
    for split, base in (("train", 0), ("val", 500)):
        for c, name in enumerate(("n01", "n02", "n03")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(per_class):
                height, width = SIZES[k % len(SIZES)]
                image = _photo(height, width, base + 100 * c + k)
                subsampling = (0, 1, 2)[k % 3]
                (folder / f"{name}_{k:02d}.JPEG").write_bytes(_encode(image, quality=90, subsampling=subsampling))
    return root


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return _write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "images", ignore=shutil.ignore_patterns(".distributed_at*"))


def _config(root, backend="pil", **options):
    augment = options.pop("augment", AugmentConfig(crop="random_resized", flip=True))
    options.setdefault("image_size", 64)
    return DataConfig(dataset="imagenet", path=str(root), backend=backend, augment=augment, num_threads=2, **options)


def _read_all(source, **options):
    return source.read(source.sample_ids, **options)


@pytest.mark.skipif(not dali_installed(), reason="DALI not installed")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("size", [64, 100])
def test_dali_on_the_cpu_and_pillow_make_the_same_pixels(pristine, train, size):
    with (
        open_split(_config(pristine, "pil", image_size=size), "train", seed=1) as one,
        open_split(_config(pristine, "dali_cpu", image_size=size), "train", seed=1) as other,
    ):
        for epoch in range(3 if train else 1):
            a, labels_a = _read_all(one, epoch=epoch, train=train)
            b, labels_b = _read_all(other, epoch=epoch, train=train)
            assert torch.equal(labels_a, labels_b)
            assert torch.equal(a, b)
            assert a.float().std() > 20, "the comparison needs images with content"


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_view_is_the_resized_centre(pristine, backend):
    with open_split(_config(pristine, backend, resize_size=73), "test", seed=0) as source:
        images, labels = _read_all(source, epoch=0, train=False)
        assert labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8
        assert images.is_contiguous(memory_format=torch.channels_last)
        picture = Image.open(pristine / "val" / "n01" / "n01_00.JPEG").convert("RGB")  # 120 x 160
        resized = np.asarray(picture.resize((97, 73), Image.Resampling.BICUBIC)).astype(int)
        expected = resized[4 : 4 + 64, 16 : 16 + 64]
        difference = np.abs(images[0].permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.mean() < 0.2, "Pillow's own resize, of which both decoders are a faster form"


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_view_is_the_same_in_every_batch_order_and_process(pristine, backend):
    config = _config(pristine, backend, augment=AugmentConfig(crop="random_resized", flip=True, colour_jitter=True))
    with open_split(config, "train", seed=7) as source:
        ids = source.sample_ids
        whole, labels = source.read(ids, epoch=2, train=True)
        shuffled = np.random.default_rng(0).permutation(ids)
        again, again_labels = source.read(shuffled, epoch=2, train=True)
        assert torch.equal(again, whole[torch.from_numpy(shuffled)])
        assert torch.equal(again_labels, labels[torch.from_numpy(shuffled)])
        assert not torch.equal(source.read(ids, epoch=3, train=True)[0], whole)
    with open_split(config, "train", seed=7) as fresh:
        for k in (3, 20):
            assert torch.equal(fresh.read(ids[k : k + 1], epoch=2, train=True)[0][0], whole[k])


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_images_than_a_decoder_takes_at_once(pristine, backend):
    with open_split(_config(pristine, backend, image_size=16), "train", seed=0) as source:
        ids = np.resize(source.sample_ids, 300)
        images, _ = source.read(ids, epoch=0, train=True)
        assert torch.equal(images[24:48], images[:24])
        assert torch.equal(images[288:], images[:12])
        assert source.read(ids[:0], epoch=0, train=True)[0].shape == (0, 3, 16, 16)


def _break(root, damage):
    """Damage four training files and return the ids by name of damage."""
    good = (root / "train" / "n02" / "n02_03.JPEG").read_bytes()
    huge = bytearray(good)
    at = huge.find(b"\xff\xc0")
    huge[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    content = {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "html": b"<html><body>404 Not Found</body></html>",
        "huge": bytes(huge),
        "garbage": os.urandom(2000),
        "header": good[:200],
    }[damage]
    (root / "train" / "n02" / "n02_03.JPEG").write_bytes(content)


@pytest.mark.parametrize("damage", ["truncated", "empty", "html", "huge", "garbage", "header"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_training_image_is_named_and_replaced_by_the_next_one(folder, backend, damage):
    _break(folder, damage)
    told = []
    with open_split(_config(folder, backend), "train", seed=1, warn=lambda c, m: told.append((c, m))) as source:
        images, labels = _read_all(source, epoch=0, train=True)
        again, _ = _read_all(source, epoch=0, train=True)
        assert list(source.damaged) == [11]
    assert [code for code, _ in told] == ["image_damaged"]
    assert "n02_03.JPEG" in told[0][1]
    assert torch.equal(images, again)
    assert labels[11] == 1
    assert images[11].float().std() > 5
    with open_split(_config(folder, backend), "train", seed=1) as source:  # its neighbours are untouched
        alone, _ = source.read(np.array([12]), epoch=0, train=True)
        assert torch.equal(alone[0], images[12])


@pytest.mark.parametrize("backend", BACKENDS)
def test_substitute_is_the_same_whether_the_index_or_the_decoder_finds_the_damage(folder, backend):
    for k in (3, 4):
        file = folder / "train" / "n02" / f"n02_{k:02d}.JPEG"
        file.write_bytes(file.read_bytes()[:-400])
    with open_split(_config(folder, backend), "train", seed=1) as source:
        late, late_labels = _read_all(source, epoch=0, train=True)
        assert sorted(source.damaged) == [11, 12]
    index = build_index(folder / "train", verify=True)
    assert sorted(index.set_aside) == [11, 12]
    with open_split(_config(folder, backend), "train", seed=1) as source:
        assert sorted(source.damaged) == [11, 12]
        early, early_labels = _read_all(source, epoch=0, train=True)
        one, _ = source.read(np.array([11]), epoch=0, train=True)
    assert torch.equal(late, early)
    assert torch.equal(late_labels, early_labels)
    assert torch.equal(one[0], early[11])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_damaged_image_is_shown_the_same_whatever_was_read_before(folder, backend):
    """Damage that a decoder meets in some windows alone must not make a resumed run differ from one that went on."""
    file = folder / "train" / "n02" / "n02_04.JPEG"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3] + b"\xff\xd9" + bytes(50))
    with open_split(_config(folder, backend), "train", seed=1) as source:
        went_on = [source.read(np.array([12]), epoch=e, train=True)[0] for e in range(8)]
    for epoch in range(8):
        with open_split(_config(folder, backend), "train", seed=1) as source:
            assert torch.equal(source.read(np.array([12]), epoch=epoch, train=True)[0], went_on[epoch])


@pytest.mark.parametrize("backend", BACKENDS)
def test_substitute_never_comes_from_the_held_out_images(folder, backend):
    config = _config(folder, backend, validation_size=8, augment=AugmentConfig())
    held = set(open_split(config, "validation", seed=0).sample_ids.tolist())
    victim = next(i for i in range(23) if i not in held and i + 1 in held)
    path = folder / "train" / load_index(folder / "train").paths[victim]
    (folder / "train" / INDEX_NAME).unlink()
    path.write_bytes(b"broken")
    with open_split(config, "train", seed=0) as source:
        shown, label = source.read(np.array([victim]), epoch=0, train=True)
        expected = next(i for i in range(victim + 1, 99) if i % 24 not in held) % 24
        image, expected_label = source.read(np.array([expected]), epoch=0, train=False)
        assert torch.equal(shown, image)
        assert torch.equal(label, expected_label)
        with pytest.raises(DataError, match="replaces no image"):
            source.read(np.array([victim]), epoch=0, train=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_replaces_nothing(folder, backend):
    file = folder / "val" / "n03" / "n03_02.JPEG"
    file.write_bytes(file.read_bytes()[:900])
    with (
        open_split(_config(folder, backend), "test", seed=0) as source,
        pytest.raises(DataError, match=r"n03_02\.JPEG.*distributed-at data verify"),
    ):
        _read_all(source, epoch=0, train=False)
    build_index(folder / "val", verify=True)
    told = []
    with open_split(_config(folder, backend), "test", seed=0, warn=lambda c, m: told.append(c)) as source:
        images, labels = _read_all(source, epoch=0, train=False)
        assert 18 not in source.sample_ids
        assert len(images) == len(labels) == source.num_samples == 23
    assert told == ["images_set_aside"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_many_damaged_images_stop_the_run(folder, backend):
    for name in ("n01", "n02"):
        for file in (folder / "train" / name).iterdir():
            file.write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"11 damaged images, more than the 10.*not an image"):
        open_split(_config(folder, backend), "train", seed=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unusual_but_sound_files_are_read(folder, backend):
    photo = _photo(100, 120, 9)
    files = {
        "n01_00.JPEG": _encode(photo.convert("L"), quality=95),
        "n01_01.JPEG": _encode(photo, "PNG"),
        "n01_02.JPEG": _encode(photo.convert("CMYK"), quality=95),
        "n01_03.JPEG": _encode(photo, quality=95, subsampling=0),
        "n01_04.JPEG": _encode(photo, quality=95, subsampling=0, progressive=True),
    }
    for name, content in files.items():
        (folder / "train" / "n01" / name).write_bytes(content)
    rotated = photo.getexif()
    rotated[274] = 6  # orientation: ignored, dimensions are those of the stored image
    (folder / "train" / "n01" / "n01_05.JPEG").write_bytes(_encode(photo, quality=95, subsampling=0, exif=rotated))
    with open_split(_config(folder, backend), "train", seed=0) as source:
        images, _ = source.read(np.arange(6), epoch=0, train=False)
        assert not source.damaged
    colour = images.float()
    assert torch.equal(images[0, 0], images[0, 1])
    grey = colour[1, 0] * 0.299 + colour[1, 1] * 0.587 + colour[1, 2] * 0.114
    assert (colour[0, 0] - grey).abs().mean() < 3
    for k in (3, 4, 5):
        assert (colour[k] - colour[1]).abs().mean() < 3
    assert np.corrcoef(colour[2].flatten(), colour[1].flatten())[0, 1] > 0.95


def test_file_changed_under_a_run_counts_as_damaged_and_the_next_start_refuses_it(folder):
    with open_split(_config(folder), "train", seed=0) as source:
        (folder / "train" / "n01" / "n01_06.JPEG").write_bytes(_encode(_photo(30, 30, 1)))
        _read_all(source, epoch=0, train=True)
        assert "when it was indexed" in source.damaged[6]
    with pytest.raises(DataError, match=r"n01_06.JPEG: is not the file that was indexed"):
        open_split(_config(folder), "train", seed=0)


def test_image_of_the_same_name_and_size_is_another_image(folder):
    """Bitmaps of one size have files of one length; what stands in them differs."""
    for seed in (1, 2):
        _photo(30, 30, seed).save(folder / "train" / "n01" / "n01_06.JPEG", format="BMP")
        if seed == 1:
            before = open_split(_config(folder), "train", seed=0).identity()
    with pytest.raises(DataError, match=r"n01_06.JPEG: is not the file that was indexed"):
        open_split(_config(folder), "train", seed=0)
    build_index(folder / "train")
    after = open_split(_config(folder), "train", seed=0).identity()
    assert after.counts == before.counts
    assert (before.difference(after) or "").startswith("other contents")


def test_index_of_an_earlier_version_is_made_again(folder):
    open_index(folder / "train")
    place = index_path(folder / "train")
    with np.load(place) as held:
        old = {name: held[name] for name in held.files if name != "fingerprints"}
    np.savez(place, **{**old, "format": np.int64(1)})
    assert len(open_index(folder / "train").fingerprints) == 24


def test_index_holds_dimensions_labels_and_reasons(folder):
    _break(folder, "html")
    steps = []
    index = build_index(folder / "train", progress=lambda done, total: steps.append((done, total)))
    assert len(index) == 24
    assert (index.heights[:8].tolist(), index.widths[:8].tolist()) == tuple(list(s) for s in zip(*SIZES, strict=True))
    assert index.set_aside == {11: "not an image: begins with b'<html><body>404 '"}
    assert steps[-1] == (24, 24)
    loaded = load_index(folder / "train")
    assert loaded.paths == index.paths
    assert loaded.set_aside == index.set_aside
    assert loaded.class_names == ("n01", "n02", "n03")
    np.testing.assert_array_equal(loaded.labels, index.labels)
    np.testing.assert_array_equal(loaded.byte_sizes, index.byte_sizes)
    assert not list((folder / "train").glob("*.tmp"))


def test_index_of_another_listing_is_refused_and_the_change_named(folder):
    open_index(folder / "train")
    shutil.copy(folder / "train" / "n01" / "n01_00.JPEG", folder / "train" / "n01" / "extra.JPEG")
    (folder / "train" / "n03" / "n03_07.JPEG").unlink()
    with pytest.raises(
        DataError, match=r"1 files gone \(e\.g\. n03/n03_07\.JPEG\), 1 files new \(e\.g\. n01/extra\.JPEG\)"
    ):
        open_index(folder / "train")
    (folder / "train" / INDEX_NAME).unlink()
    assert len(open_index(folder / "train")) == 24


def test_damaged_index_is_refused_with_the_fix(folder):
    open_index(folder / "train")
    target = folder / "train" / INDEX_NAME
    for content in (b"", b"PK", target.read_bytes()[:500]):
        target.write_bytes(content)
        with pytest.raises(DataError, match=r"cannot be read.*Delete"):
            open_index(folder / "train")


def test_index_is_kept_in_the_named_cache(folder, tmp_path):
    cache = tmp_path / "cache" / "index.npz"
    build_index(folder / "train", cache=cache)
    assert not (folder / "train" / INDEX_NAME).exists()
    assert len(open_index(folder / "train", cache=cache)) == 24


def test_wrong_layouts_say_what_was_looked_for_and_found(folder, tmp_path):
    with pytest.raises(DataError, match=r"train/<wnid>.*does not exist"):
        open_split(_config(tmp_path / "nowhere"), "train", seed=0)
    with pytest.raises(DataError, match=r"holds \['n01', 'n02', 'n03'\]"):
        open_split(_config(folder / "train"), "train", seed=0)
    with pytest.raises(DataError, match=r"num_classes is 1000.*3 classes"):
        open_split(_config(folder, num_classes=1000), "train", seed=0)
    shutil.rmtree(folder / "val" / "n02")
    with pytest.raises(DataError, match=r"1 only in train \(e\.g\. n02\)"):
        open_split(_config(folder), "test", seed=0)
    for name in ("n01", "n03"):
        shutil.rmtree(folder / "val" / name)
    (folder / "val" / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"x")
    with pytest.raises(DataError, match="1 loose images"):
        open_split(_config(folder), "test", seed=0)


def test_settings_that_do_not_fit_a_folder_are_refused(folder):
    with pytest.raises(ConfigError, match="pad"):
        open_split(_config(folder, augment=AugmentConfig(crop="pad")), "train", seed=0)
    with pytest.raises(ConfigError, match="resize_size"):
        open_split(_config(folder, resize_size=32), "train", seed=0)
    if not torch.cuda.is_available():
        with pytest.raises(DataError, match="CUDA"):
            open_split(_config(folder, "dali_gpu"), "train", seed=0)


def test_without_dali_the_choice_is_pillow_and_asking_for_dali_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    monkeypatch.setattr("distributed_at.data.sources.dali_installed", lambda: False)
    assert choose_backend(_config(folder, "auto")) == "pil"
    with pytest.raises(DataError, match="dali-cuda13"):
        open_split(_config(folder, "dali_cpu"), "train", seed=0)


def test_description_names_decoder_listing_and_geometry(pristine):
    with open_split(_config(pristine), "test", seed=0) as source:
        described = source.describe()
    assert described["decoder"].startswith("pil ")
    assert described["resize_size"] == 73
    assert described["listing"] == load_index(pristine / "val").checksum
