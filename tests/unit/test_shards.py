"""Tar shards give the folder's own bytes and pixels by sample id, and a damaged shard is refused by name."""

import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from distributed_at.cli import main
from distributed_at.config import AugmentConfig, DataConfig
from distributed_at.data import build_index, open_split
from distributed_at.data.machine import dali_installed
from distributed_at.data.shards import SHARDS_NAME, has_shards, load_shards, verify_shards, write_shards
from distributed_at.errors import ConfigError, DataError

BACKENDS = ["pil", pytest.param("dali_cpu", marks=pytest.mark.skipif(not dali_installed(), reason="no DALI"))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("folder")
    rng = np.random.default_rng(0)
    for split, number in (("train", 7), ("val", 2)):
        for name in ("n01", "n02"):
            (root / split / name).mkdir(parents=True)
            for k in range(number):
                pixels = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((50 + k, 40 + 2 * k))
                image.save(root / split / name / f"{name}_{k}.{'png' if k == 3 else 'JPEG'}")
    (root / "train" / "n02" / "n02_1.JPEG").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    dest = tmp_path_factory.mktemp("shards") / "packed"
    assert main(["data", "shard", str(folder), str(dest), "--size", "4"]) == 0
    return dest


@pytest.fixture
def copy(shards, tmp_path):
    """The training shards, to damage."""
    target = tmp_path / "train"
    target.mkdir()
    for path in (shards / "train").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def _edit(folder, **changes):
    with np.load(folder / SHARDS_NAME) as content:
        values = dict(content)
    np.savez(folder / SHARDS_NAME, **{**values, **changes})


def _data(path, backend="pil"):
    augment = AugmentConfig(crop="random_resized", flip=True)
    return DataConfig(
        dataset="imagenet", path=str(path), image_size=32, backend=backend, num_threads=1, augment=augment
    )


def test_every_payload_is_the_files_own_bytes_under_its_id(folder, shards):
    for split in ("train", "val"):
        files, packed = build_index(folder / split), load_shards(shards / split)
        assert packed.paths == files.paths
        assert packed.checksum == files.checksum
        assert packed.set_aside == files.set_aside
        np.testing.assert_array_equal(packed.labels, files.labels)
        for i, path in enumerate(files.paths):
            assert packed.encoded(i).tobytes() == (folder / split / path).read_bytes()
    assert len(load_shards(shards / "train").shards.names) == 4


def test_shards_are_tars_that_any_reader_opens(folder, shards):
    files = build_index(folder / "train")
    found = {}
    for path in sorted((shards / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                found[member.name] = tar.extractfile(member).read()
    for i, path in enumerate(files.paths):
        suffix = ".png" if path.endswith("png") else ".jpg"
        assert found[f"{i:08d}{suffix}"] == (folder / "train" / path).read_bytes()
        assert found[f"{i:08d}.cls"] == str(files.labels[i]).encode()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_labels_and_ids_are_those_of_the_folder(folder, shards, backend, split):
    with (
        open_split(_data(folder, backend), split, seed=1) as files,
        open_split(_data(shards, backend), split, seed=1) as packed,
    ):
        np.testing.assert_array_equal(files.sample_ids, packed.sample_ids)
        assert files.describe() == packed.describe()
        for epoch in (0, 3):
            a = files.read(files.sample_ids, epoch=epoch, train=split == "train")
            b = packed.read(packed.sample_ids, epoch=epoch, train=split == "train")
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


def test_equal_folders_give_equal_shards(folder, shards, tmp_path):
    write_shards(folder / "train", tmp_path / "again", size=4)
    for path in (shards / "train").glob("*.tar"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_closed_shards_open_again(shards):
    index = load_shards(shards / "train")
    first = index.encoded(0)
    index.close()
    assert index.encoded(0).tobytes() == first.tobytes()


def test_shard_cut_short_is_named_before_training(copy):
    path = copy / "shard-00002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard-00002\.tar: has \d+ bytes, had \d+"):
        load_shards(copy)


def test_absent_shard_is_named(copy):
    (copy / "shard-00000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.tar: the shard is absent"):
        load_shards(copy)


def test_damaged_index_is_refused_with_the_command_that_makes_it(copy):
    (copy / SHARDS_NAME).write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="data shard FOLDER"):
        load_shards(copy)


def test_verify_finds_a_flipped_bit_and_an_index_of_another_order(copy, capsys):
    assert verify_shards(copy)[1] == {}
    path = copy / "shard-00001.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(bytes(data))
    assert list(verify_shards(copy)[1]) == ["shard-00001.tar"]
    assert main(["data", "verify", str(copy)]) == 3
    assert "damaged: train/shard-00001.tar" in capsys.readouterr().err
    data[600] ^= 1
    path.write_bytes(bytes(data))
    with np.load(copy / SHARDS_NAME) as content:
        offset = content["offset"].copy()
    offset[[0, 1]] = offset[[1, 0]]
    _edit(copy, offset=offset)
    assert verify_shards(copy)[1] == {"shard-00000.tar": "its images lie elsewhere than the index says"}


def test_targets_that_would_lose_or_mix_files_are_refused(folder, shards, tmp_path):
    with pytest.raises(ConfigError, match="is not empty"):
        write_shards(folder / "val", shards / "train", size=4)
    with pytest.raises(ConfigError, match="lies inside"):
        write_shards(folder / "val", folder / "val" / "packed", size=4)
    with pytest.raises(ConfigError, match="at least 1 image"):
        write_shards(folder / "val", tmp_path / "none", size=0)


def test_file_changed_since_it_was_indexed_leaves_nothing_behind(folder, tmp_path):
    source = tmp_path / "source"
    (source / "n01").mkdir(parents=True)
    image = source / "n01" / "a.JPEG"
    image.write_bytes((folder / "val" / "n01" / "n01_0.JPEG").read_bytes())
    build_index(source)
    image.write_bytes(image.read_bytes() + b"x")
    with pytest.raises(DataError, match="is not the file that was indexed"):
        write_shards(source, tmp_path / "packed", size=4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert not has_shards(tmp_path / "packed")


def test_train_and_val_shards_of_other_classes_are_refused(folder, shards, tmp_path):
    (tmp_path / "one" / "n01").mkdir(parents=True)
    (tmp_path / "one" / "n01" / "a.JPEG").write_bytes((folder / "val" / "n01" / "n01_0.JPEG").read_bytes())
    root = tmp_path / "mixed"
    root.mkdir()
    write_shards(tmp_path / "one", root / "val", size=4)
    os.rename(write_shards(folder / "train", tmp_path / "t", size=8).root, root / "train")
    with pytest.raises(DataError, match="Labels would not agree"):
        open_split(_data(root), "train", seed=0)
