"""One-dimensional fragments of tensors and the planners that let torch.distributed.checkpoint write and reshard them.

A fragment knows where it lies in its flattened tensor, so that a file set written by any number of ranks opens on any
other. Only torch's public planner interface is used; which fragments a rank owns is ``checkpoint_state``'s business.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

_PORTION = 64 << 20  # bytes that are brought to all ranks at a time, or the largest tensor
_SMALLEST_PIECE = 1 << 16  # elements; each piece has a container and an entry in torch's table of its own


@dataclass(frozen=True)
class FlatShard:
    """Elements ``[start, start + local.numel())`` of a flattened tensor of ``math.prod(shape)`` elements.

    ``local`` is 1-D and normally aliases live storage. Where it cannot (another memory format, a value that several
    tensors share), ``on_load`` carries the loaded values to where they belong; it runs after everything is loaded.
    """

    local: torch.Tensor  # (n,), n may be 0
    start: int
    shape: tuple[int, ...]  # of the whole tensor
    on_load: Callable[[], None] | None = None
    replicated: bool = False  # ``local`` is the whole tensor, equal on all ranks

    def __post_init__(self) -> None:
        if self.local.ndim != 1:
            raise ValueError(f"local must be one-dimensional, got shape {tuple(self.local.shape)}")
        if self.start < 0 or self.start + self.local.numel() > self.numel:
            raise ValueError(f"[{self.start}, {self.start + self.local.numel()}) is outside {self.numel} elements")

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> FlatShard:
        """All of ``tensor``, aliasing it where it is contiguous and copying back on load where it is not."""
        tensor = tensor.detach()
        shape = tuple(tensor.shape)
        if tensor.is_contiguous():
            return cls(tensor.view(-1), 0, shape, replicated=True)
        local = tensor.reshape(-1)  # logical order: the file does not depend on the memory format

        def copy_back() -> None:
            tensor.copy_(local.view(shape))

        return cls(local, 0, shape, copy_back, replicated=True)

    def share(self, name: str, rank: int, world_size: int) -> FlatShard:
        """Return what this rank saves of tensor ``name``: its part of what all ranks hold alike, all of its own.

        Large tensors are cut into equal pieces, small ones have one writer; who begins is drawn by the name, so that no
        rank copies and writes much more than another.
        """
        if not self.replicated:
            return self
        pieces = max(1, min(world_size, self.numel // _SMALLEST_PIECE))
        piece = (rank - zlib.crc32(name.encode())) % world_size
        start, end = (self.numel * min(i, pieces) // pieces for i in (piece, piece + 1))
        return FlatShard(self.local[start:end], start, self.shape)

    def chunks(self) -> list[ChunkStorageMetadata]:
        """Where this fragment lies; empty where this rank owns nothing of the tensor."""
        if self.local.numel() == 0:
            return []
        return [ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.local.numel()]))]


def as_shards(tensors: Mapping[str, torch.Tensor | FlatShard]) -> dict[str, FlatShard]:
    """Wrap plain tensors (equal on all ranks) as whole fragments."""
    return {k: v if isinstance(v, FlatShard) else FlatShard.whole(v) for k, v in tensors.items()}


def complete(shards: Mapping[str, FlatShard], own: Mapping[str, FlatShard], group: dist.ProcessGroup) -> None:
    """Bring what each rank read of the tensors that all hold alike to all of them (collective).

    Args:
        shards: where the whole tensors lie.
        own: this rank's ``share`` of each, filled.
        group: gloo, of all ranks.
    """
    names = [name for name, shard in shards.items() if shard.replicated and shard.numel]
    for some in _portions(names, shards):
        sizes = [shards[name].local.numel() * shards[name].local.element_size() for name in some]
        together = torch.zeros(-(-sum(sizes) // 8) * 8, dtype=torch.uint8)
        places = dict(zip(some, together[: sum(sizes)].split(sizes), strict=True))
        for name, place in places.items():
            piece = own[name]
            width = piece.local.element_size()
            begin = piece.start * width
            place[begin : begin + piece.local.numel() * width] = _bytes_of(piece.local)
        # each bit is given by one rank and is zero on the others, so that a sum of integers is no arithmetic
        dist.all_reduce(together.view(torch.int64), group=group)
        for name, place in places.items():
            target = shards[name].local
            target.copy_(place.clone().view(target.dtype))  # a view of another type must begin where that type may


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8)


def _portions(names: list[str], shards: Mapping[str, FlatShard]) -> Iterator[list[str]]:
    """Deal out names so that no portion needs much memory."""
    portion: list[str] = []
    size = 0
    for name in names:
        portion.append(name)
        size += shards[name].local.numel() * shards[name].local.element_size()
        if size >= _PORTION:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def snapshot(shards: Mapping[str, FlatShard], reuse: dict[str, torch.Tensor]) -> dict[str, FlatShard]:
    """Copy every fragment to host memory, so that training may go on while the copy is written.

    ``reuse`` keeps the host buffers (pinned where the source is on a GPU) from one snapshot to the next.
    """
    copies: dict[str, FlatShard] = {}
    on_gpu = False
    for name, shard in shards.items():
        source = shard.local
        held = reuse.get(name)
        if held is None or held.shape != source.shape or held.dtype != source.dtype:
            held = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            reuse[name] = held
        on_gpu |= source.is_cuda
        held.copy_(source, non_blocking=source.is_cuda)
        copies[name] = FlatShard(held, shard.start, shard.shape)
    if on_gpu:
        torch.cuda.synchronize()
    for name in reuse.keys() - shards.keys():
        del reuse[name]
    return copies


class FlatSavePlanner(DefaultSavePlanner):
    """Writes each rank's fragments."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards: dict[str, FlatShard] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the fragments; see the base class."""
        self._shards = state_dict
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        """One write item per fragment that this rank holds."""
        items = []
        for name, shard in self._shards.items():
            for chunk in shard.chunks():
                data = TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=shard.local.dtype),
                    size=torch.Size([shard.numel]),
                )
                index = MetadataIndex(name, chunk.offsets)
                items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        """Return the fragment's values."""
        return self._shards[index.fqn].local


class FlatLoadPlanner(DefaultLoadPlanner):
    """Fills fragments from whatever fragments were saved; refuses names, sizes, dtypes and gaps that do not fit."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shards: dict[str, FlatShard] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the fragments to fill; see the base class."""
        self._shards = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Read items that cover each local fragment wholly."""
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, shard in self._shards.items():
            chunks = shard.chunks()
            if not chunks:
                continue
            saved = self.metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata)
            reads = create_read_items_for_chunk_list(name, saved, chunks)
            if sum(math.prod(item.lengths) for item in reads) != shard.local.numel():
                raise ValueError(f"the files hold only a part of {name!r}")
            items += reads
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Return the view of the fragment that ``read_item`` fills."""
        shard = self._shards[read_item.dest_index.fqn]
        return shard.local.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])


def mismatches(shards: Mapping[str, FlatShard], metadata: Metadata, shapes: Mapping[str, Any]) -> list[str]:
    """Return one line for each wanted tensor that the checkpoint lacks or holds with another shape or dtype."""
    found = []
    for name, shard in shards.items():
        if shard.numel == 0:
            continue
        saved = metadata.state_dict_metadata.get(name)
        if not isinstance(saved, TensorStorageMetadata):
            found.append(f"{name} is not in it")
        elif tuple(saved.size) != (shard.numel,) or tuple(shapes.get(name, ())) != shard.shape:
            found.append(f"{name} has shape {list(shapes.get(name, saved.size))} there and {list(shard.shape)} here")
        elif saved.properties.dtype != shard.local.dtype:
            found.append(f"{name} is {saved.properties.dtype} there and {shard.local.dtype} here")
    return found
