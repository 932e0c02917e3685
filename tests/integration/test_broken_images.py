"""Every kind of odd or broken file: both decoders make the same of it, and the message says what it is."""

import io
import os
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from distributed_at.cli import main
from distributed_at.config import AugmentConfig, DataConfig
from distributed_at.data import build_index, open_split
from distributed_at.data.imagenet import FAILURE_FLOOR
from distributed_at.data.index import INDEX_NAME, survey
from distributed_at.data.machine import dali_installed
from distributed_at.data.shards import write_shards
from distributed_at.errors import DataError

needs_dali = pytest.mark.skipif(not dali_installed(), reason="DALI not installed")
BACKENDS = ["pil", pytest.param("dali_cpu", marks=needs_dali)]
HEIGHT, WIDTH = 60, 80


def _picture(seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def _encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GOOD = _encode(_picture(), quality=90)


def _declares(height, width):
    content = bytearray(GOOD)
    at = content.find(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def _png_of_16_bits(channels):
    """Pillow writes none in colour."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = np.random.default_rng(0).integers(0, 65536, (HEIGHT, WIDTH * channels)).astype(">u2")
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _with_alpha():
    image = _picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint16).astype(np.uint8).reshape(HEIGHT, WIDTH)))
    return image


SOUND = {
    "grey JPEG": _encode(_picture().convert("L"), quality=90),
    "CMYK JPEG": _encode(_picture().convert("CMYK"), quality=90),
    "progressive JPEG": _encode(_picture(), quality=90, progressive=True),
    "JPEG with more behind its end": GOOD + b"more" * 50,
    "PNG": _encode(_picture(), "PNG"),
    "PNG with a palette": _encode(_picture().quantize(32), "PNG"),
    "PNG of black and white": _encode(_picture().convert("1"), "PNG"),
    "PNG with alpha": _encode(_with_alpha(), "PNG"),
    "WebP": _encode(_picture(), "WEBP"),
    "WebP of many frames": _encode(_picture(), "WEBP", save_all=True, append_images=[_picture(1)]),
    "BMP": _encode(_picture(), "BMP"),
    "one pixel": _encode(_picture().resize((1, 1)), quality=90),
}
DEPTH = "has more than 8 bits a channel, which decoders scale differently"
OTHER = "images are JPEG, PNG, WebP or BMP, under any name"
HEADER = {  # refused by the header alone: (content, reason)
    "empty": (b"", "empty file"),
    "text": (b"<html>404 Not Found</html>", "not an image: begins with b'<html>404 Not Fo'"),
    "no height": (_declares(0, WIDTH), "a JPEG whose header is damaged"),
    "no width": (_declares(HEIGHT, 0), "a JPEG whose header is damaged"),
    "absurd size": (_declares(65535, 65535), "declares more than 134217728 pixels"),
    "large size": (_declares(11000, 13000), "declares 13000 x 11000 pixels, more than 134217728"),
    "TIFF": (_encode(_picture(), "TIFF"), f"a TIFF; {OTHER}"),
    "GIF": (_encode(_picture().quantize(64), "GIF"), f"a GIF; {OTHER}"),
    "JPEG 2000": (_encode(_picture(), "JPEG2000"), f"a JPEG 2000; {OTHER}"),
    "grey PNG of 16 bits": (_png_of_16_bits(1), DEPTH),
    "PNG of 16 bits": (_png_of_16_bits(3), DEPTH),
    "WebP cut short": (_encode(_picture(), "WEBP")[:300], "cannot be decoded: could not create decoder object"),
}
DECODING = {  # found by decoding, in 'data verify' or in training
    "JPEG cut short": (GOOD[: len(GOOD) // 2], "cut short: a JPEG without its end"),
    "PNG cut short": (_encode(_picture(), "PNG")[:3000], "cannot be decoded: image file is truncated"),
    "BMP cut short": (
        _encode(_picture(), "BMP")[:9000],
        "cannot be decoded: image file is truncated (66 bytes not processed)",
    ),
}
NO_FILE = {
    "folder": (lambda path: path.mkdir(), "a folder, not a file"),
    "link": (lambda path: path.symlink_to("nowhere"), "a link to a file that is not there"),
    "pipe": (lambda path: os.mkfifo(path), "not a plain file"),
}


def _folder(root, odd=None, *, per_class=3):
    """Two classes; ``odd``: name -> content, more images of the first class in train and in val."""
    for split in ("train", "val"):
        for c, name in enumerate(("n01", "n02")):
            (root / split / name).mkdir(parents=True)
            for k in range(per_class):
                number = 100 + 100 * (split == "val") + 10 * c + k
                (root / split / name / f"{name}_{k}.JPEG").write_bytes(_encode(_picture(number), quality=90))
        for name, content in (odd or {}).items():
            (root / split / "n01" / f"odd {name}.JPEG").write_bytes(content)
    return root


def _open(root, backend, split, told=None):
    config = DataConfig(
        dataset="imagenet", path=str(root), image_size=32, backend=backend, num_threads=1,
        augment=AugmentConfig(crop="random_resized", flip=True),
    )  # fmt: skip
    return open_split(
        config, split, seed=0, warn=None if told is None else lambda code, text: told.append((code, text))
    )


def _reasons(index):
    return {index.paths[i].removeprefix("n01/odd ").removesuffix(".JPEG"): r for i, r in index.set_aside.items()}


@needs_dali
def test_sound_kinds_have_the_same_pixels_behind_both_decoders(tmp_path):
    _folder(tmp_path, SOUND)
    assert survey(tmp_path / "train", verify=True).set_aside == {}
    for split in ("train", "test"):
        with _open(tmp_path, "pil", split) as one, _open(tmp_path, "dali_cpu", split) as other:
            for epoch in range(3):
                first = one.read(one.sample_ids, epoch=epoch, train=split == "train")[0]
                second = other.read(other.sample_ids, epoch=epoch, train=split == "train")[0]
                assert torch.equal(first, second)
            assert not one.damaged
            assert not other.damaged


def test_header_alone_tells_what_is_no_image_and_decoding_finds_the_rest(tmp_path):
    broken = HEADER | DECODING
    _folder(tmp_path, {name: content for name, (content, _) in broken.items()})
    for name, (make, _) in NO_FILE.items():
        make(tmp_path / "train" / "n01" / f"odd {name}.JPEG")
    files = {name: reason for name, (_, reason) in NO_FILE.items()}
    header = {name: reason for name, (_, reason) in HEADER.items()} | files
    assert _reasons(survey(tmp_path / "train")) == header
    assert _reasons(survey(tmp_path / "train", verify=True)) == header | {n: r for n, (_, r) in DECODING.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*HEADER, *DECODING])
def test_training_replaces_the_file_and_tells_the_reason(name, backend, tmp_path):
    content, reason = (HEADER | DECODING)[name]
    _folder(tmp_path, {name: content})
    told = []
    with _open(tmp_path, backend, "train", told) as source:
        images, _ = source.read(source.sample_ids, epoch=0, train=True)
        assert list(source.damaged.values()) == [reason]
        assert all(image.float().std() > 5 for image in images)
    place = tmp_path / "train" / "n01" / f"odd {name}.JPEG"
    said = f"{place}: {reason}; the next readable image of the listing is shown in its place"
    assert told == [("image_damaged", said)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_kind_of_damage_in_one_batch(backend, tmp_path):
    _folder(tmp_path, {name: content for name, (content, _) in DECODING.items()})
    (tmp_path / "train" / "n01" / "odd gone.JPEG").write_bytes(GOOD)
    (tmp_path / "train" / "n01" / "odd changed.JPEG").write_bytes(GOOD)
    build_index(tmp_path / "train")
    with _open(tmp_path, backend, "train") as source:
        (tmp_path / "train" / "n01" / "odd changed.JPEG").write_bytes(GOOD + b"more")
        (tmp_path / "train" / "n01" / "odd gone.JPEG").unlink()
        source.read(source.sample_ids, epoch=0, train=True)
        found = sorted(source.damaged.values())
    changed = f"has {len(GOOD) + 4} bytes, had {len(GOOD)} when it was indexed"
    assert found == sorted([*(reason for _, reason in DECODING.values()), "the file is gone", changed])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DECODING)
def test_evaluation_names_the_file_and_the_way_out(name, backend, tmp_path):
    content, reason = DECODING[name]
    _folder(tmp_path, {name: content})
    with _open(tmp_path, backend, "test") as source, pytest.raises(DataError) as caught:
        source.read(source.sample_ids, epoch=0, train=False)
    val = tmp_path / "val"
    assert str(caught.value) == (
        f"{val / 'n01' / f'odd {name}.JPEG'}: {reason}. An evaluation replaces no image: restore the file, or set it aside "
        f"openly: distributed-at data verify {val}"
    )


def test_more_than_a_few_damaged_files_stop_training_with_the_way_to_list_them(tmp_path):
    _folder(tmp_path, {f"{i:02d}": b"<html>" for i in range(FAILURE_FLOOR + 1)})
    with pytest.raises(DataError, match=f"'distributed-at data verify {tmp_path / 'train'}' lists them all"):
        _open(tmp_path, "pil", "train")


def test_verify_names_all_of_them_at_once(tmp_path, capsys):
    broken = HEADER | DECODING
    _folder(tmp_path, {name: content for name, (content, _) in broken.items()})
    for split in ("train", "val"):
        for name, (make, _) in NO_FILE.items():
            make(tmp_path / split / "n01" / f"odd {name}.JPEG")
    assert main(["data", "verify", str(tmp_path)]) == 3
    said = capsys.readouterr().err.splitlines()
    for split in ("train", "val"):
        for name, (_, reason) in (broken | NO_FILE).items():
            assert f"set aside: {split}/n01/odd {name}.JPEG: {reason}" in said


def test_verify_names_what_is_gone_and_new_and_keeps_the_index(tmp_path, capsys):
    _folder(tmp_path)
    build_index(tmp_path / "train")
    before = (tmp_path / "train" / INDEX_NAME).read_bytes()
    (tmp_path / "train" / "n01" / "n01_1.JPEG").rename(tmp_path / "train" / "n02" / "n02_9.JPEG")
    assert main(["data", "verify", str(tmp_path / "train")]) == 3
    said = capsys.readouterr().err
    assert "gone: train/n01/n01_1.JPEG: in the index, but no longer in the folder" in said
    assert "new: train/n02/n02_9.JPEG: in the folder, but not in the index" in said
    assert f"accept the change: distributed-at data index {tmp_path / 'train'}" in said
    assert (tmp_path / "train" / INDEX_NAME).read_bytes() == before
    assert main(["data", "index", str(tmp_path / "train")]) == 0
    assert main(["data", "verify", str(tmp_path / "train")]) == 0


def test_verify_names_equal_files_within_and_between_splits(tmp_path, capsys):
    _folder(tmp_path)
    for place in ("train/n01/n01_2.JPEG", "train/n02/n02_0.JPEG", "val/n02/n02_1.JPEG"):
        (tmp_path / place).write_bytes(GOOD)
    assert main(["data", "verify", str(tmp_path)]) == 0  # nothing is damaged
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("same bytes")] == [
        "same bytes: train/n02/n02_0.JPEG: as train/n01/n01_2.JPEG; both are kept",
        "same bytes: val/n02/n02_1.JPEG: as train/n01/n01_2.JPEG; both are kept",
    ]


@pytest.fixture
def shards(tmp_path):
    folder = _folder(tmp_path / "images", per_class=6)
    for split in ("train", "val"):
        write_shards(folder / split, tmp_path / "shards" / split, size=3)
    return tmp_path / "shards"


def _rewrite(path, change):
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in change(members):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _swap(members):
    """Two images under each other's names: a reader by offset sees the other image with this label."""
    names = [name for name, _ in members]
    names[0], names[2] = names[2], names[0]
    return [(name, content) for name, (_, content) in zip(names, members, strict=True)]


def test_verify_names_every_damaged_shard_at_once(shards, capsys):
    train = shards / "train"
    _rewrite(train / "shard-00000.tar", _swap)
    (train / "shard-00001.tar").write_bytes((train / "shard-00001.tar").read_bytes()[:-512])
    (train / "shard-00002.tar").unlink()
    size = (train / "shard-00003.tar").stat().st_size
    _rewrite(train / "shard-00003.tar", lambda members: [*members, *members[:2]])  # a member twice
    written = (train / "shard-00001.tar").stat().st_size
    assert main(["data", "verify", str(shards)]) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("damaged: ")]
    after = (train / "shard-00003.tar").stat().st_size
    twice = (
        "its bytes are not those that were written"
        if after == size
        else f"has {after} bytes, had {size} when it was written"
    )
    assert said == [
        "damaged: train/shard-00000.tar: its bytes are not those that were written",
        f"damaged: train/shard-00001.tar: has {written} bytes, had {written + 512} when it was written",
        "damaged: train/shard-00002.tar: the shard is absent or no plain file",
        f"damaged: train/shard-00003.tar: {twice}",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_shard_cut_short_under_a_run_is_told_like_a_damaged_file(shards, backend, monkeypatch):
    monkeypatch.setattr("distributed_at.data.imagenet._RETRY_SECONDS", 0.0)
    with _open(shards, backend, "train") as source:
        path = shards / "train" / "shard-00003.tar"
        path.write_bytes(path.read_bytes()[:1000])
        images, _ = source.read(source.sample_ids, epoch=0, train=True)
        assert source.damaged == {i: f"cannot be read: shard-00003.tar ends inside image {i}" for i in range(9, 12)}
        assert all(image.float().std() > 5 for image in images)
