"""Extra images are packed once, exactly, resumably, without filling the memory, and a packed set that changed is noticed."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from distributed_at.cli import main
from distributed_at.config import ExtraConfig
from distributed_at.data import packing
from distributed_at.data.extra import ExtraSet, cache_folder, open_extra
from distributed_at.data.packed import PackedImages, read_manifest
from distributed_at.data.packing import pack_extra
from distributed_at.errors import ConfigError, DataError

SIZE = 4


def write_parts(folder: Path, *counts: int, save=np.savez, seed: int = 0, classes: int = 10) -> list[Path]:
    """Write .npz parts of so many images and return their paths."""
    draw, paths = np.random.default_rng(seed), []
    for number, count in enumerate(counts):
        paths.append(folder / f"part{number}.npz")
        images = draw.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
        save(paths[-1], image=images, label=draw.integers(0, classes, count))
    return paths


def content(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Read parts with numpy alone."""
    loaded = [np.load(path) for path in paths]
    return np.concatenate([part["image"] for part in loaded]), np.concatenate([part["label"] for part in loaded])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shard_images", [None, 7, 10, 100])
def test_packed_images_are_those_of_all_parts_in_order(tmp_path, monkeypatch, save, shard_images):
    monkeypatch.setattr("distributed_at.data.extra_files.ROWS", 6)
    paths = write_parts(tmp_path, 10, 1, 22, save=save)
    images, labels = content(paths)
    manifest = pack_extra(paths, tmp_path / "packed", shard_images=shard_images)
    packed = PackedImages(tmp_path / "packed")
    rows = np.random.default_rng(1).permutation(33)
    np.testing.assert_array_equal(packed.read(rows), images[rows])
    np.testing.assert_array_equal(packed.labels(rows), labels[rows])
    assert len(packed) == 33
    assert len(manifest.shards) == -(-33 // (shard_images or 33))
    assert manifest.counts == {label: int((labels == label).sum()) for label in np.unique(labels).tolist()}


def test_a_pickle_packs_like_the_archive_of_the_same_images(tmp_path):
    paths = write_parts(tmp_path, 20)
    images, labels = content(paths)
    (tmp_path / "ti.pickle").write_bytes(pickle.dumps({"data": images, "extrapolated_targets": labels}, 3))
    first = pack_extra(paths, tmp_path / "a")
    assert pack_extra([tmp_path / "ti.pickle"], tmp_path / "b").digest == first.digest


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def killed_after(monkeypatch, calls: int) -> None:
    """End the process's packing at the ``calls``-th file operation that makes something durable."""
    counter = itertools.count(1)
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def counting(*args, original=original, **kwargs):
            if next(counter) == calls:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, counting)


def test_a_kill_at_any_point_leaves_nothing_that_counts_as_whole_and_the_next_call_goes_on(tmp_path):
    paths = write_parts(tmp_path, 9, 8, save=np.savez_compressed)
    images, labels = content(paths)
    whole = pack_extra(paths, tmp_path / "whole", shard_images=5).digest
    for calls in itertools.count(1):
        folder = tmp_path / f"killed{calls}"
        with pytest.MonkeyPatch.context() as patch:
            killed_after(patch, calls)
            try:
                pack_extra(paths, folder, shard_images=5)
                break
            except Killed:
                pass
        if not (folder / "extra.json").exists():  # the very last sync comes after the set is whole
            with pytest.raises(DataError, match=r"interrupted|looked for extra.json"):
                PackedImages(folder)
        assert pack_extra(paths, folder, shard_images=5).digest == whole
        packed = PackedImages(folder)
        np.testing.assert_array_equal(packed.read(np.arange(17)), images)
        np.testing.assert_array_equal(packed.labels(np.arange(17)), labels)
        assert not [name for name in os.listdir(folder) if name.endswith(".part") or name == "packing.json"]
    assert calls > 20


def test_what_is_packed_already_is_not_read_again(tmp_path, monkeypatch):
    paths = write_parts(tmp_path, 9, 8)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, 14)
        with pytest.raises(Killed):
            pack_extra(paths, tmp_path / "packed", shard_images=5)
    done = len(json.loads((tmp_path / "packed" / "packing.json").read_text())["shards"])
    assert done >= 1
    written = []
    original = packing.Packer._write
    monkeypatch.setattr(packing.Packer, "_write", lambda self, *args: (written.append(1), original(self, *args)))
    manifest = pack_extra(paths, tmp_path / "packed", shard_images=5)
    assert len(written) == len(manifest.shards) - done
    pack_extra(paths, tmp_path / "packed", shard_images=5)
    assert len(written) == len(manifest.shards) - done


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_archive_of_another_checksum_is_not_packed_by_any_number_of_calls(tmp_path, save):
    """Its images end where a shard ends, so that no later image brings the checksum to light."""
    paths = write_parts(tmp_path, 3000, 5, save=save)
    raw = bytearray(paths[0].read_bytes())
    raw[raw.index(b"PK\x01\x02") + 16] ^= 255  # in the table of contents
    paths[0].write_bytes(raw)
    for _ in range(3):
        with pytest.raises(DataError, match=r"part0.npz: not a whole .npz archive .*CRC"):
            pack_extra(paths, tmp_path / "packed", shard_images=1000)
        with pytest.raises(DataError, match="interrupted"):
            PackedImages(tmp_path / "packed")


def test_a_file_that_changed_is_packed_anew_and_is_another_set(tmp_path):
    paths = write_parts(tmp_path, 12)
    config = ExtraConfig(files=(str(paths[0]),), labelled_ratio=0.5)
    first = open_extra(config, num_classes=10, image_size=SIZE).identity()
    assert open_extra(config, num_classes=10, image_size=SIZE).identity() == first
    images, labels = content(paths)
    images[3, 1, 1, 1] ^= 1
    np.savez(paths[0], image=images, label=labels)
    changed = open_extra(config, num_classes=10, image_size=SIZE)
    assert "other contents" in first.difference(changed.identity())
    np.testing.assert_array_equal(changed.read(np.arange(12)), images)
    with pytest.raises(ConfigError, match="packed from other files, or from these before they changed"):
        pack_extra(write_parts(tmp_path, 13), cache_folder(paths, None))


@pytest.mark.parametrize("what", ["first image", "last image", "a label", "size", "gone"])
def test_a_packed_set_that_was_touched_is_refused(tmp_path, what):
    pack_extra(write_parts(tmp_path, 12), tmp_path / "packed", shard_images=8)
    shard, labels = tmp_path / "packed" / "images-00001.bin", tmp_path / "packed" / "labels-00001.bin"
    path = labels if what == "a label" else shard
    raw = bytearray(path.read_bytes())
    raw[0 if what == "first image" else -1] ^= 1
    path.write_bytes(raw[:-1] if what == "size" else raw)
    if what == "gone":
        path.unlink()
    with pytest.raises(
        DataError, match=r"-00001.bin: (its bytes, or|has 191 bytes, had 192|the file is absent).*pack it again"
    ):
        PackedImages(tmp_path / "packed")


def test_verify_reads_every_byte_of_a_packed_set(tmp_path, capsys):
    paths = write_parts(tmp_path, 400)
    assert main(["data", "pack-extra", *map(str, paths), "--output", str(tmp_path / "packed"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 400
    assert main(["data", "verify", str(tmp_path / "packed")]) == 0
    shard = tmp_path / "packed" / "images-00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1  # far from both ends
    shard.write_bytes(raw)
    PackedImages(tmp_path / "packed")
    assert main(["data", "verify", str(tmp_path / "packed")]) == 3
    assert "images-00000.bin: its bytes are not those that were packed" in capsys.readouterr().err


def test_a_shard_cut_short_under_a_reader_is_told(tmp_path):
    pack_extra(write_parts(tmp_path, 12), tmp_path / "packed")
    packed = PackedImages(tmp_path / "packed")
    os.truncate(tmp_path / "packed" / "images-00000.bin", 100)
    with pytest.raises(DataError, match="ends inside the image at byte 96"):
        packed.read(np.array([2]))


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    labelled = write_parts(tmp_path, 5)[0]
    np.savez(tmp_path / "bare.npz", image=np.zeros((5, SIZE, SIZE, 3), np.uint8), label=np.full(5, -1))
    np.savez(tmp_path / "large.npz", image=np.zeros((5, 6, 6, 3), np.uint8), label=np.zeros(5, int))
    with pytest.raises(DataError, match="either all images of a set have a label or none has"):
        pack_extra([labelled, tmp_path / "bare.npz"], tmp_path / "a")
    with pytest.raises(DataError, match=r"of one size.*large.npz 6"):
        pack_extra([labelled, tmp_path / "large.npz"], tmp_path / "b")
    with pytest.raises(DataError, match=r"labels lie in \[0, 3\)"):
        pack_extra(write_parts(tmp_path, 50), tmp_path / "c", num_classes=3)
    with pytest.raises(ConfigError, match=r"holds a, b, bare.npz, c, which is no part of a packed set"):
        pack_extra([labelled], tmp_path)
    with pytest.raises(DataError, match=r"absent.npz: cannot be read"):
        pack_extra([tmp_path / "absent.npz"], tmp_path / "d")
    with pytest.raises(ConfigError, match="cannot be written to"):
        pack_extra([labelled], labelled / "inside")


def test_what_a_recipe_names_is_refused_with_the_reason(tmp_path):
    part = write_parts(tmp_path, 30)[0]

    def opened(*files, num_classes=10, image_size=SIZE, **options):
        config = ExtraConfig(files=tuple(map(str, files)), labelled_ratio=0.5, **options)
        return open_extra(config, num_classes=num_classes, image_size=image_size)

    with pytest.raises(DataError, match="have 4 pixels, those of the data set 32"):
        opened(part, image_size=32)
    with pytest.raises(DataError, match=r"have label [2-9]; labels lie in \[0, 2\)"):
        opened(part, num_classes=2)
    with pytest.raises(DataError, match=r"no packed set of extra images: looked for extra.json"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match="is a folder beside 1 others"):
        opened(part, tmp_path)
    with pytest.raises(DataError, match="its images have no scores"):
        opened(part, keep=10)
    held = cache_folder([part], None)
    part.unlink()
    with pytest.raises(DataError, match=f"does not exist; the set packed from it stands in {held}"):
        opened(part)
    assert len(opened(held)) == 30


def test_a_table_that_contradicts_itself_is_refused(tmp_path):
    pack_extra(write_parts(tmp_path, 12), tmp_path / "packed")
    path = tmp_path / "packed" / "extra.json"
    text = path.read_text()
    for old, new, reason in (
        ('"images": 12', '"images": 13', "contradicts itself"),
        ('"format": 1', '"format": 2', "this version reads 1"),
        ('"counts"', '"count"', "not the table of a packed set"),
        ("{", "", "cannot be read"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(DataError, match=reason):
            read_manifest(tmp_path / "packed")


def _peak() -> int:
    """Return the most bytes that this process ever held; the C library's figure begins with its parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _peak_of(queue, paths, folder, reads) -> None:
    """Pack and read in a process of its own; report by how many bytes its memory rose at most."""
    pack_extra(write_tiny(Path(folder)), Path(folder) / "tiny")  # what is imported and allocated once
    before = _peak()
    pack_extra(paths, Path(folder) / "packed")
    extra = ExtraSet(PackedImages(Path(folder) / "packed"), num_classes=10)
    draw = np.random.default_rng(0)
    for _ in range(reads):
        extra.read(draw.integers(0, len(extra), 1024))
    queue.put(_peak() - before)


def write_tiny(folder: Path) -> list[Path]:
    """Write a part of the size of one piece."""
    path = folder / "tiny.npz"
    np.savez(path, image=np.zeros((4096, 32, 32, 3), np.uint8), label=np.zeros(4096, int))
    return [path]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_neither_packing_nor_reading_takes_memory_in_proportion(tmp_path):
    paths = []
    for number in range(2):
        paths.append(tmp_path / f"part{number}.npz")
        block = np.full((22_000, 32, 32, 3), number, np.uint8)
        np.savez(paths[-1], image=block, label=np.zeros(len(block), int))
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_peak_of, args=(queue, paths, str(tmp_path), 45))
    process.start()
    rose = queue.get()
    process.join()
    held = 44_000 * 3072
    assert rose < held / 5, f"{rose:,} bytes more for a set of {held:,}"
