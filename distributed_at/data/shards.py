"""Tar shards of an image folder, for file systems that hate small files: written once, read by offset.

A split becomes ``shard-00000.tar``, ``shard-00001.tar``, … in WebDataset's layout (``<id>.<ext>`` with the file's own
bytes, ``<id>.cls`` with its label) and one ``shards.npz`` that says where each image lies. Ids, labels and the listing's
checksum are those of the folder, so runs on either are the same runs. Reading never opens a name out of a tar.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from distributed_at.data.index import FolderIndex, Progress, open_index, pack_texts, unpack_texts
from distributed_at.data.shard_table import ShardTable
from distributed_at.errors import ConfigError, DataError

SHARDS_NAME = "shards.npz"
_FORMAT = 1
_SHARD = re.compile(r"shard-\d{5}\.tar")
_HEADER = 512  # bytes of a tar header before each payload
_SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")


def write_shards(
    folder: str | Path, target: str | Path, *, size: int, num_threads: int = 0, progress: Progress | None = None
) -> FolderIndex:
    """Pack a folder of class folders into shards of ``size`` images; the index is written last, whole or not at all.

    Files that the folder's index set aside are packed as they are and stay set aside.

    Raises:
        ConfigError: a size below 1, or a target that holds something else already.
        DataError: absent folder, or a file that changed since it was indexed.
    """
    folder, target = Path(folder), Path(target)
    if size < 1:
        raise ConfigError(f"a shard holds at least 1 image, got {size}")
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty: shards are written into a new folder")
    if target.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"{target} lies inside {folder}: its shards would become images of the folder")
    index = open_index(folder, num_threads=num_threads, progress=progress)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        _pack_folder(index, aside, size, progress)
        if target.exists():
            target.rmdir()
        os.replace(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return load_shards(target)


def _pack_folder(index: FolderIndex, target: Path, size: int, progress: Progress | None) -> None:
    count = len(index)
    shard, offset, length = np.zeros(count, np.int32), np.zeros(count, np.int64), np.zeros(count, np.int64)
    names, sizes, digests = [], [], []
    for number, first in enumerate(range(0, count, size)):
        name = f"shard-{number:05d}.tar"
        with (
            open(target / name, "wb") as file,
            tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for i in range(first, min(first + size, count)):
                data = index.encoded(i).tobytes()
                if i not in index.set_aside and len(data) != index.byte_sizes[i]:
                    raise DataError(
                        f"{index.place(i)}: has {len(data)} bytes, had {index.byte_sizes[i]} when it was indexed; "
                        "index the folder anew first"
                    )
                shard[i], offset[i], length[i] = number, file.tell() + _HEADER, len(data)
                _add(tar, f"{i:08d}{_suffix(index.paths[i])}", data)
                _add(tar, f"{i:08d}.cls", str(int(index.labels[i])).encode())
            tar.close()
            file.flush()
            os.fsync(file.fileno())
        names.append(name)
        sizes.append((target / name).stat().st_size)
        digests.append(_sha256(target / name))
        if progress is not None:
            progress(min(first + size, count), count)
    with open(target / SHARDS_NAME, "wb") as file:
        np.savez(
            file,
            format=np.int64(_FORMAT),
            class_names=pack_texts(index.class_names),
            paths=pack_texts(index.paths),
            labels=index.labels,
            heights=index.heights,
            widths=index.widths,
            byte_sizes=index.byte_sizes,
            aside_ids=np.array(list(index.set_aside), dtype=np.int64),
            aside_reasons=pack_texts(reason.replace("\0", " ") for reason in index.set_aside.values()),
            verified=np.bool_(index.verified),
            checksum=pack_texts([index.checksum]),
            fingerprints=index.fingerprints,
            shard_names=pack_texts(names),
            shard_sizes=np.array(sizes, dtype=np.int64),
            shard_digests=pack_texts(digests),
            shard=shard,
            offset=offset,
            length=length,
        )
        file.flush()
        os.fsync(file.fileno())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, owner or mode of this machine: equal folders give equal shards
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _suffix(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower().replace(".jpeg", ".jpg")
    return suffix if _SUFFIX.fullmatch(suffix) else ".img"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def has_shards(folder: str | Path) -> bool:
    """Whether ``folder`` holds shards instead of class folders."""
    return (Path(folder) / SHARDS_NAME).is_file()


@contextmanager
def _content(folder: Path) -> Iterator[np.lib.npyio.NpzFile]:
    target = folder / SHARDS_NAME
    fix = f"Write the shards again: distributed-at data shard FOLDER {folder.parent}"
    try:
        with np.load(target, allow_pickle=False) as content:
            if int(content["format"]) != _FORMAT:
                raise DataError(f"{target}: format {int(content['format'])}, this version reads {_FORMAT}. {fix}")
            yield content
    except (DataError, FileNotFoundError):
        raise
    except Exception as error:  # a damaged archive raises many types
        raise DataError(f"{target}: cannot be read ({type(error).__name__}: {error}). {fix}") from None


def load_shards(folder: str | Path) -> FolderIndex:
    """Read the index of a folder of shards and check it against the files.

    Raises:
        DataError: a damaged index, a shard that is absent, of another size, no plain file, or named outside the folder,
            or an image that does not lie inside its shard.
    """
    index, table = _read(Path(folder))
    _check_columns(index, table)
    for name, reason in _shards_differ(table).items():
        raise DataError(f"{table.root / name}: {reason}; restore it, or write the shards again")
    return index


def _read(folder: Path) -> tuple[FolderIndex, ShardTable]:
    with _content(folder) as content:
        table = ShardTable(
            root=folder,
            names=unpack_texts(content["shard_names"]),
            sizes=content["shard_sizes"],
            shard=content["shard"],
            offset=content["offset"],
            length=content["length"],
        )
        index = FolderIndex(
            root=folder,
            class_names=unpack_texts(content["class_names"]),
            paths=unpack_texts(content["paths"]),
            labels=content["labels"],
            heights=content["heights"],
            widths=content["widths"],
            byte_sizes=content["byte_sizes"],
            set_aside=dict(zip(content["aside_ids"].tolist(), unpack_texts(content["aside_reasons"]), strict=True)),
            verified=bool(content["verified"]),
            checksum=unpack_texts(content["checksum"])[0],
            # shards of an earlier version have none: the sizes of their files stand in
            fingerprints=content["fingerprints" if "fingerprints" in content.files else "byte_sizes"].astype(np.uint64),
            shards=table,
        )
    return index, table


def _check_columns(index: FolderIndex, table: ShardTable) -> None:
    """Refuse an index that contradicts itself or points outside its folder or its shards."""
    where = table.root / SHARDS_NAME
    columns = (
        index.labels,
        index.heights,
        index.widths,
        index.byte_sizes,
        index.fingerprints,
        table.shard,
        table.offset,
        table.length,
    )
    if any(column.shape != (len(index),) for column in columns) or table.sizes.shape != (len(table.names),):
        raise DataError(f"{where}: its columns do not belong together; write the shards again")
    for name in table.names:
        if not _SHARD.fullmatch(name):
            raise DataError(f"{where}: names a shard {name!r}; shards are plain files shard-00000.tar beside the index")
    known = (table.shard >= 0) & (table.shard < len(table.names))
    inside = known & (table.offset >= _HEADER) & (table.length >= 0)
    inside[known] &= table.offset[known] + table.length[known] <= table.sizes[table.shard[known]]
    if not inside.all():
        raise DataError(f"{where}: image {int(np.argmin(inside))} lies outside its shard; write the shards again")


def _shards_differ(table: ShardTable) -> dict[str, str]:
    """Return name -> reason for shards that are absent, no plain files, or of another size than when they were written."""
    wrong = {}
    for name, size in zip(table.names, table.sizes.tolist(), strict=True):
        path = table.root / name
        if path.is_symlink() or not path.is_file():
            wrong[name] = "the shard is absent or no plain file"
        elif path.stat().st_size != size:
            wrong[name] = f"has {path.stat().st_size} bytes, had {size} when it was written"
    return wrong


def verify_shards(folder: str | Path) -> tuple[FolderIndex, dict[str, str]]:
    """Read every byte of every shard; return the index and name -> what is wrong, empty where all is as it was written.

    Raises:
        DataError: an index that is absent, damaged, or points outside its folder or its shards.
    """
    folder = Path(folder)
    index, table = _read(folder)
    _check_columns(index, table)
    with _content(folder) as content:
        digests = unpack_texts(content["shard_digests"])
    wrong = _shards_differ(table)
    for number, (name, digest) in enumerate(zip(table.names, digests, strict=True)):
        if name in wrong:
            continue
        if _sha256(folder / name) != digest:
            wrong[name] = "its bytes are not those that were written"
            continue
        with open(folder / name, "rb") as file:
            reason = _members_differ(file, index, number)
        if reason:
            wrong[name] = reason
    return index, dict(sorted(wrong.items()))


def _members_differ(file: IO[bytes], index: FolderIndex, number: int) -> str:
    """Compare a tar's own headers with the index: a reader of tars must find what a reader by offset finds."""
    table = index.shards
    assert table is not None
    expected = {int(i): (int(table.offset[i]), int(table.length[i])) for i in np.flatnonzero(table.shard == number)}
    found = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            stem, _, suffix = member.name.partition(".")
            if not member.isfile() or not stem.isdigit():
                return f"holds {member.name!r}, which is no image of the index"
            if suffix != "cls":
                found[int(stem)] = (member.offset_data, member.size)
    return "" if found == expected else "its images lie elsewhere than the index says"
