"""Images for training and evaluation: which samples a step uses, and their pixels, all from counters."""

from distributed_at.data.augment import Views
from distributed_at.data.index import FolderIndex, build_index, load_index, open_index
from distributed_at.data.order import StepOrder
from distributed_at.data.prefetch import Prefetcher
from distributed_at.data.source import ArraySource, ImageSource
from distributed_at.data.sources import choose_backend, open_split

__all__ = [
    "ArraySource",
    "FolderIndex",
    "ImageSource",
    "Prefetcher",
    "StepOrder",
    "Views",
    "build_index",
    "choose_backend",
    "load_index",
    "open_index",
    "open_split",
]
