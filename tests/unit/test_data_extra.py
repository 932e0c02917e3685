"""Extra images are read in both published forms, and what is not in them is refused with the reason."""

import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from distributed_at.cli import main
from distributed_at.data.extra import labels_of_file
from distributed_at.data.extra_files import open_extra_file
from distributed_at.errors import DataError

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
LABELS = np.array([3, 0, 9, 3, 3, 1, 0])


def read_extra(path, num_classes=1000):
    """Read a file as a whole, as packing does piece by piece."""
    pieces = list(open_extra_file(path).pieces(num_classes=num_classes))
    return SimpleNamespace(images=np.concatenate([p[0] for p in pieces]), labels=np.concatenate([p[1] for p in pieces]))


def _pickle(path, protocol=3, **content):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def _npz(path, save=np.savez, **content):
    save(path, **content)
    return path


def _write(folder, form, **changes):
    if form == "pickle":
        content = {"data": IMAGES, "extrapolated_targets": LABELS, "prediction_model": "wrn", **changes}
        return _pickle(folder / "extra.pickle", **content)
    content = {"image": IMAGES, "label": LABELS, **changes}
    return _npz(folder / "extra.npz", np.savez_compressed if form == "compressed" else np.savez, **content)


@pytest.mark.parametrize("form", ["pickle", "npz", "compressed"])
@pytest.mark.parametrize("kind", ["u1", "i2", "<i4", "i8", ">i8"])
def test_images_and_labels_come_back_in_every_published_form(tmp_path, form, kind):
    key = "extrapolated_targets" if form == "pickle" else "label"
    path = _write(tmp_path, form, **{key: LABELS.astype(kind)})
    extra = read_extra(path, num_classes=10)
    np.testing.assert_array_equal(extra.images, IMAGES)
    np.testing.assert_array_equal(extra.labels, LABELS)
    assert extra.images.dtype == np.uint8
    assert extra.labels.dtype == np.int64
    assert labels_of_file(path, num_classes=10) == (7, 32, {0: 2, 1: 1, 3: 3, 9: 1})


@pytest.mark.parametrize("form", ["pickle", "npz"])
def test_labels_of_many_classes_come_back_as_they_are(tmp_path, form):
    labels = np.array([0, 127, 128, 255, 256, 700, 999])
    key = "extrapolated_targets" if form == "pickle" else "label"
    assert read_extra(_write(tmp_path, form, **{key: labels})).labels.tolist() == labels.tolist()


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
def test_pickles_of_every_protocol_and_column_order_are_read(tmp_path, protocol):
    column_first = np.asfortranarray(IMAGES)
    path = _pickle(tmp_path / "extra.pickle", protocol, data=column_first, extrapolated_targets=LABELS)
    if protocol == 5:  # its arrays use another constructor, with which the field published nothing
        with pytest.raises(DataError, match="_frombuffer"):
            read_extra(path)
    else:
        np.testing.assert_array_equal(read_extra(path).images, IMAGES)


REFUSED = {
    "other keys": ({"data": None, "extrapolated_targets": None, "x": IMAGES}, "holds no 'data'"),
    "floats": ({"data": IMAGES / 255}, "'f8' where pixels are uint8"),
    "images of another size": ({"data": IMAGES[:, :28]}, r"must be uint8 \(N, H, H, 3\), found uint8 \(7, 28, 32, 3\)"),
    "flat images": ({"data": IMAGES.reshape(7, -1)}, r"found uint8 \(7, 3072\)"),
    "signed pixels": ({"data": IMAGES.view(np.int8)}, "found int8"),
    "no images": ({"data": IMAGES[:0], "extrapolated_targets": LABELS[:0]}, r"found uint8 \(0,"),
    "too few labels": ({"extrapolated_targets": LABELS[:6]}, "must be 7 integers, one per image"),
    "labels of two columns": ({"extrapolated_targets": LABELS[:, None]}, r"found int64 \(7, 1\)"),
    "a list of labels": ({"extrapolated_targets": LABELS.tolist()}, "must be a numpy array, found list"),
    "a negative label": ({"extrapolated_targets": np.array([3, 0, -2, 3, 3, 1, 0])}, r"image 2 is -2; labels lie in \[0, 10\)"),
    "one image without a label": ({"extrapolated_targets": np.array([3, 0, -1, 3, 3, 1, 0])}, "image 2 is -1, and images before it have a label"),
    "one image with a label": ({"extrapolated_targets": np.array([-1, -1, -1, 3, -1, -1, -1])}, r"image 3 is 3, and images before it have no label \(-1\)"),
    "a label past the classes": ({"extrapolated_targets": LABELS + 1}, r"image 2 is 10; labels lie in \[0, 10\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_extra_data_is_refused_with_the_reason(tmp_path, name):
    changes, reason = REFUSED[name]
    content = {"data": IMAGES, "extrapolated_targets": LABELS, **changes}
    path = _pickle(tmp_path / "extra.pickle", **{key: value for key, value in content.items() if value is not None})
    with pytest.raises(DataError, match=reason):
        read_extra(path, num_classes=10)


def test_float_labels_and_other_keys_of_an_archive_are_refused(tmp_path):
    with pytest.raises(DataError, match="must be 7 integers"):
        read_extra(_npz(tmp_path / "a.npz", image=IMAGES, label=LABELS.astype(float)))
    with pytest.raises(DataError, match=r"holds no 'label'.*this file holds 'image', 'labels'"):
        read_extra(_npz(tmp_path / "b.npz", image=IMAGES, labels=LABELS))


@pytest.mark.parametrize("form", ["pickle", "npz"])
def test_files_cut_short_are_refused(tmp_path, form):
    path = _write(tmp_path, form)
    whole = path.read_bytes()
    for length in (0, 1, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"not a complete pickle|[Gg]et (the file|it) again"):
            read_extra(path)


def test_verify_says_what_a_file_holds(tmp_path, capsys):
    path = _write(tmp_path, "npz")
    assert main(["data", "verify", str(path)]) == 0
    assert "0: 2  1: 1  3: 3  9: 1" in capsys.readouterr().out
    assert main(["data", "verify", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "file": str(path),
        "images": 7,
        "shape": [32, 32, 3],
        "labels_per_class": {"0": 2, "1": 1, "3": 3, "9": 1},
    }
    assert main(["data", "verify", str(path), "--split", "train"]) == 2
    assert "--split is for folders" in capsys.readouterr().err
