"""CIFAR, SVHN and digits: published files are read exactly, and strange ones run nothing."""

import io
import pickle
import pickletools

import numpy as np
import pytest
import torch

from distributed_at.config import AugmentConfig, DataConfig
from distributed_at.data import open_split
from distributed_at.data.cifar import read_cifar
from distributed_at.data.safe_pickle import load_data_pickle
from distributed_at.errors import ConfigError, DataError

ROWS = 20


def _rows(seed):
    return np.random.default_rng(seed).integers(0, 256, (ROWS, 3072), dtype=np.uint8)


def _python2_pickle(rows, labels, name):
    """The bytes that Python 2's cPickle wrote for the published batches: str data in protocol 2, numpy 1 names."""

    def text(value):
        raw = value if isinstance(value, bytes) else value.encode()
        return b"T" + len(raw).to_bytes(4, "little") + raw

    def integer(value):
        return b"J" + int(value).to_bytes(4, "little", signed=True)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + integer(0) + b"\x85" + text("b") + b"\x87R"
    )
    dtype = b"cnumpy\ndtype\n" + text("u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + text("|") + b"NNN" + integer(-1) + integer(-1) + integer(0) + b"tb"
    shape = integer(rows.shape[0]) + integer(rows.shape[1]) + b"\x86"
    array += b"(" + integer(1) + shape + dtype + b"\x89" + text(rows.tobytes()) + b"tb"
    body = b"\x80\x02}(" + text("batch_label") + text(name)
    body += text("labels") + b"](" + b"".join(integer(y) for y in labels) + b"e"
    return body + text("data") + array + b"u."


def _write_cifar(root, style, dataset="cifar10"):
    """Write a small CIFAR in one of its layouts; return train rows, labels, test rows, labels."""
    parts = {}
    ten = dataset == "cifar10"
    names = {
        "train": [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"],
        "test": ["test_batch" if ten else "test"],
    }
    folder = {
        ("cifar10", False): "cifar-10-batches-py", ("cifar10", True): "cifar-10-batches-bin",
        ("cifar100", False): "cifar-100-python", ("cifar100", True): "cifar-100-binary",
    }[dataset, style == "binary"]  # fmt: skip
    out = root / folder
    out.mkdir(parents=True)
    seed = 0
    for split in ("train", "test"):
        all_rows, all_labels = [], []
        for name in names[split]:
            seed += 1
            rows, labels = _rows(seed), np.random.default_rng(seed + 50).integers(0, 10 if ten else 100, ROWS)
            all_rows.append(rows)
            all_labels.append(labels)
            if style == "binary":
                head = labels[:, None] if ten else np.stack([labels // 5, labels], axis=1)
                np.concatenate([head.astype(np.uint8), rows], axis=1).tofile(out / f"{name}.bin")
            elif style == "python2":
                (out / name).write_bytes(_python2_pickle(rows, labels.tolist(), name))
            else:
                key = b"labels" if ten else b"fine_labels"
                content = {b"data": rows, key: labels.tolist(), b"batch_label": name.encode()}
                (out / name).write_bytes(pickle.dumps(content, 2))
        parts[split] = (np.concatenate(all_rows), np.concatenate(all_labels))
    return parts


def _config(dataset, path, **options):
    size = {"digits": 8}.get(dataset, 32)
    return DataConfig(dataset=dataset, path=str(path) if path else None, image_size=size, **options)


@pytest.mark.parametrize(
    ("dataset", "style"),
    [
        ("cifar10", "python2"),
        ("cifar10", "python3"),
        ("cifar10", "binary"),
        ("cifar100", "python3"),
        ("cifar100", "binary"),
    ],
)
def test_cifar_reads_exactly_what_was_published(tmp_path, style, dataset):
    parts = _write_cifar(tmp_path, style, dataset)
    for split in ("train", "test"):
        rows, labels = parts[split]
        with open_split(_config(dataset, tmp_path), split, seed=0) as source:
            images, found = source.read(source.sample_ids, epoch=0, train=False)
            assert images.dtype == torch.uint8
            assert images.is_contiguous(memory_format=torch.channels_last)
            np.testing.assert_array_equal(images.numpy().reshape(-1, 3072), rows)  # published rows are channel first
            np.testing.assert_array_equal(found.numpy(), labels)
            np.testing.assert_array_equal(source.labels(source.sample_ids), labels)


def test_cifar_folder_itself_may_be_the_path(tmp_path):
    _write_cifar(tmp_path, "python3")
    assert len(read_cifar(tmp_path / "cifar-10-batches-py", "cifar10", "test")[1]) == ROWS


def test_the_python2_fixture_is_what_the_ordinary_unpickler_reads():
    rows = _rows(0)
    data = _python2_pickle(rows, range(ROWS), "x")
    pickletools.dis(data, out=io.StringIO())
    np.testing.assert_array_equal(pickle.loads(data, encoding="bytes")[b"data"], rows)


def test_unpublished_number_of_images_is_told(tmp_path):
    _write_cifar(tmp_path, "python3")
    told = []
    open_split(_config("cifar10", tmp_path), "train", seed=0, warn=lambda code, message: told.append((code, message)))
    assert told[0][0] == "data_size"
    assert "50000" in told[0][1]


def test_pixels_of_another_type_and_cut_files_are_refused(tmp_path):
    file = tmp_path / "batch"
    file.write_bytes(pickle.dumps({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}, 2))
    with pytest.raises(DataError, match="uint8"):
        load_data_pickle(file)
    whole = pickle.dumps({b"data": _rows(0), b"labels": [0] * ROWS}, 2)
    for cut in (0, 1, 40, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="complete pickle"):
            load_data_pickle(file)


def test_absent_cifar_says_what_was_looked_for_and_found(tmp_path):
    with pytest.raises(DataError, match=r"cifar-10-batches-py.*does not exist"):
        open_split(_config("cifar10", tmp_path / "none"), "train", seed=0)
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(DataError, match=r"readme.txt.*download"):
        open_split(_config("cifar10", tmp_path), "train", seed=0)
    _write_cifar(tmp_path, "python3")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(DataError, match="lacks data_batch_3"):
        open_split(_config("cifar10", tmp_path), "train", seed=0)


def test_binary_file_cut_short_is_refused(tmp_path):
    _write_cifar(tmp_path, "binary")
    file = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DataError, match="whole rows"):
        open_split(_config("cifar10", tmp_path), "test", seed=0)


def test_wrong_size_or_class_number_names_the_field():
    with pytest.raises(DataError, match="image_size"):
        open_split(DataConfig(dataset="digits", image_size=32), "train", seed=0)
    with pytest.raises(DataError, match=r"num_classes is 7.*10 classes"):
        open_split(DataConfig(dataset="digits", image_size=8, num_classes=7), "train", seed=0)


def _write_svhn(folder, split, n=12):
    from scipy.io import savemat

    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    labels = (np.arange(n) % 10 + 1).astype(np.uint8)  # 1..10, 10 stands for the digit 0
    savemat(folder / f"{split}_32x32.mat", {"X": images, "y": labels[:, None]})
    return images, labels


def test_svhn_reads_images_and_maps_ten_to_zero(tmp_path):
    images, labels = _write_svhn(tmp_path, "train")
    with open_split(_config("svhn", tmp_path), "train", seed=0) as source:
        got, found = source.read(source.sample_ids, epoch=0, train=False)
    np.testing.assert_array_equal(got.numpy(), images.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(found.numpy(), labels % 10)


def test_absent_svhn_names_the_file(tmp_path):
    with pytest.raises(DataError, match=r"train_32x32\.mat"):
        open_split(_config("svhn", tmp_path), "train", seed=0)


def test_digits_are_three_equal_channels_on_the_full_scale():
    with open_split(_config("digits", None), "train", seed=0) as source:
        images, labels = source.read(source.sample_ids, epoch=0, train=False)
    assert images.shape[1:] == (3, 8, 8)
    assert int(images.max()) == 255
    assert int(images.min()) == 0
    assert torch.equal(images[:, 0], images[:, 2])
    assert sorted(set(labels.tolist())) == list(range(10))


def test_train_validation_and_test_share_no_image():
    config = _config("digits", None, validation_size=200)
    ids = {
        split: set(open_split(config, split, seed=0).sample_ids.tolist()) for split in ("train", "validation", "test")
    }
    assert [len(ids[s]) for s in ("train", "validation", "test")] == [1237, 200, 360]
    assert len(set.union(*ids.values())) == 1797


def test_validation_without_a_size_is_refused():
    with pytest.raises(ConfigError, match="validation_size"):
        open_split(_config("digits", None), "validation", seed=0)


def test_limits_shrink_a_split_and_keep_its_ids():
    whole = open_split(_config("digits", None), "train", seed=0)
    small = open_split(_config("digits", None, limit_train=50, limit_test=30), "train", seed=0)
    assert small.num_samples == 50
    assert set(small.sample_ids.tolist()) < set(whole.sample_ids.tolist())
    one, other = small.sample_ids[:5], small.sample_ids[:5]
    assert torch.equal(small.read(one, epoch=0, train=False)[0], whole.read(other, epoch=0, train=False)[0])
    assert open_split(_config("digits", None, limit_test=30), "test", seed=0).num_samples == 30


def test_id_of_another_split_is_refused():
    config = _config("digits", None, validation_size=100)
    train, held = (open_split(config, s, seed=0) for s in ("train", "validation"))
    with pytest.raises(ValueError, match="not in the train split"):
        train.read(held.sample_ids[:2], epoch=0, train=False)


def test_training_view_of_a_sample_is_the_same_in_every_batch():
    config = _config("digits", None, augment=AugmentConfig(crop="pad", pad=1, flip=True, colour_jitter=True))
    source = open_split(config, "train", seed=4)
    ids = source.sample_ids[:12]
    whole, labels = source.read(ids, epoch=3, train=True)
    back, _ = open_split(config, "train", seed=4).read(ids[::-1].copy(), epoch=3, train=True)
    assert torch.equal(back.flip(0), whole)
    alone, label = source.read(ids[5:6], epoch=3, train=True)
    assert torch.equal(alone[0], whole[5])
    assert label[0] == labels[5]
    assert not torch.equal(source.read(ids, epoch=3, train=True, seed=5)[0], whole)
    assert not torch.equal(source.read(ids, epoch=4, train=True)[0], whole)


def test_description_changes_with_the_pixels(tmp_path):
    _write_cifar(tmp_path / "a", "python3")
    _write_cifar(tmp_path / "b", "python3")
    file = tmp_path / "b" / "cifar-10-batches-py" / "test_batch"
    content = pickle.loads(file.read_bytes(), encoding="bytes")
    content[b"data"][0, 0] ^= 1
    file.write_bytes(pickle.dumps(content, 2))
    first, second = (open_split(_config("cifar10", tmp_path / k), "test", seed=0).describe() for k in ("a", "b"))
    assert first["ids"] == second["ids"]
    assert first["content"] != second["content"]


@pytest.mark.parametrize("dataset", ["cifar10", "svhn"])
def test_a_download_that_fails_leaves_nothing_behind(dataset, tmp_path, monkeypatch):
    from distributed_at.data.download import download

    def no_connection(*args, **kwargs):
        raise OSError("no route")

    for name in ("download_and_extract_archive", "download_url"):
        monkeypatch.setattr(f"torchvision.datasets.utils.{name}", no_connection)
    with pytest.raises(DataError, match="no route"):
        download(dataset, tmp_path / "new" / "data")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("kept")
    with pytest.raises(DataError, match="no route"):
        download(dataset, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["file"]
