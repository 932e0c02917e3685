"""Reads checkpoint files that may come from a stranger: no code in them runs, and no size in them is believed unchecked."""

from __future__ import annotations

import importlib
import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from distributed_at.engine.checkpoint.files import BadCheckpoint, Manifest, open_plain
from distributed_at.plain_pickle import PlainUnpickler

_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("torch", dtype) for dtype in _DTYPES),
}
_ZIP_SLACK = 1 << 16  # bytes of a zip container beside its tensor


class _MetadataUnpickler(PlainUnpickler):
    """Builds the dozen plain classes that ``.metadata`` consists of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise BadCheckpoint(f".metadata asks for {module}.{name}, which no checkpoint needs; nothing was run")
        return getattr(importlib.import_module(module), name)


class _RememberingFile(io.FileIO):
    """Keeps the first error of the disk, which torch's container writer replaces by one about positions."""

    def __init__(self, path: Path, mode: str, errors: list[OSError]) -> None:
        super().__init__(path, mode)
        self._errors = errors

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self._errors.append(error)
            raise


class _RememberingFileSystem(FileSystem):
    def __init__(self) -> None:
        self.errors: list[OSError] = []

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with io.BufferedWriter(_RememberingFile(Path(path), mode, self.errors)) as stream:
            yield stream


class PlainWriter(FileSystemWriter):
    """torch's file writer, which syncs files; here it leaves no local path in them and remembers the disk's errors."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, single_file_per_rank=True, sync_files=True, thread_count=1, overwrite=False)
        self._remembering = _RememberingFileSystem()
        self.fs = self._remembering

    @property
    def disk_error(self) -> str | None:
        """What the disk said first, if it refused."""
        errors = self._remembering.errors
        return errors[0].strerror if errors else None

    def storage_meta(self) -> StorageMeta | None:
        """No identifiers: two saves of the same state differ in nothing."""
        return None


class SafeReader(FileSystemReader):
    """Reads the files that a checked manifest lists, with a restricted unpickler and bounded allocations."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder)
        self._folder = folder
        self._manifest = manifest

    def read_metadata(self) -> Metadata:
        """Return torch's metadata after checking types, names, offsets and lengths."""
        with os.fdopen(open_plain(self._folder / ".metadata"), "rb") as file:
            raw = file.read(self._manifest.files[".metadata"][0] + 1)
        try:
            metadata = _MetadataUnpickler(io.BytesIO(raw)).load()
            self._check(metadata)
        except BadCheckpoint:
            raise
        except Exception as error:  # a hostile pickle can raise anything; whatever it is, the file is refused
            raise BadCheckpoint(f".metadata cannot be read: {type(error).__name__}: {error}") from None
        return metadata

    def _check(self, metadata: Any) -> None:
        if type(metadata) is not Metadata or type(metadata.state_dict_metadata) is not dict:
            raise BadCheckpoint(".metadata does not hold a table of tensors")
        if type(metadata.storage_data) is not dict:
            raise BadCheckpoint(".metadata does not say where its tensors are stored")
        total = 0
        for name, saved in metadata.state_dict_metadata.items():
            if type(name) is not str or type(saved) is not TensorStorageMetadata:
                raise BadCheckpoint(f".metadata holds something other than a tensor: {name!r}")
            if type(saved.properties.dtype) is not torch.dtype or len(saved.size) != 1 or saved.size[0] < 0:
                raise BadCheckpoint(f".metadata describes {name!r} in a way that no checkpoint does")
            if math.prod(self._manifest.shapes.get(name, (-1,))) != saved.size[0]:
                raise BadCheckpoint(f".metadata and the manifest disagree about the size of {name!r}")
            total += saved.size[0] * saved.properties.dtype.itemsize
        if total > self._manifest.num_bytes:
            raise BadCheckpoint(
                f".metadata promises {total} bytes of tensors, the files have {self._manifest.num_bytes}"
            )
        for index, info in metadata.storage_data.items():
            size = self._manifest.files.get(info.relative_path, (-1,))[0]
            numbers = type(info.offset) is int and type(info.length) is int
            if type(index) is not MetadataIndex or not numbers or getattr(info, "transform_descriptors", None):
                raise BadCheckpoint(f".metadata stores {index!r} in a way that no checkpoint does")
            if size < 0:
                raise BadCheckpoint(f".metadata points to a file outside the manifest: {info.relative_path!r}")
            if info.offset < 0 or info.length < 0 or info.offset + info.length > size:
                raise BadCheckpoint(f".metadata points outside {info.relative_path}")

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every planned piece into its destination."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            if item.type != LoadItemType.TENSOR:
                raise BadCheckpoint("only tensors are read from a checkpoint")
            by_file.setdefault(self.storage_data[item.storage_index].relative_path, []).append(item)
        for name, items in by_file.items():
            with os.fdopen(open_plain(self._folder / name), "rb") as file:
                for item in sorted(items, key=lambda i: self.storage_data[i.storage_index].offset):
                    info = self.storage_data[item.storage_index]
                    piece = _read_tensor(file, info.offset, info.length)
                    piece = piece.narrow(0, item.storage_offsets[0], item.lengths[0])
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(piece)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def load_without_code(file: Path | io.BytesIO) -> Any:
    """Return what a file of torch's holds; BadCheckpoint, where torch would advise to trust it, if it names code."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {named[1]}, which tensors do not need" if named else "it holds something other than tensors"
        raise BadCheckpoint(f"{what}; nothing in it was run") from None


def _read_tensor(file: io.BufferedReader, offset: int, length: int) -> torch.Tensor:
    """Return the 1-D tensor stored at ``[offset, offset + length)``; a compressed (exploding) container is refused."""
    file.seek(offset)
    raw = io.BytesIO(file.read(length))
    with zipfile.ZipFile(raw) as container:
        entries = container.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise BadCheckpoint("a tensor's container is compressed, which no checkpoint is")
        if sum(entry.file_size for entry in entries) > length + _ZIP_SLACK:
            raise BadCheckpoint("a tensor's container is larger inside than outside")
    raw.seek(0)
    tensor = load_without_code(raw)
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 1 or tensor.untyped_storage().nbytes() > length:
        raise BadCheckpoint("a stored piece is not a one-dimensional tensor")
    return tensor
