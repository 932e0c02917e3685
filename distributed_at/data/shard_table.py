"""Where the bytes of a packed folder's images lie in its shards, and the reading of them."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(eq=False)
class ShardTable:
    """Where the bytes of each image are.

    Attributes:
        root: folder of the shards.
        names: file names of the shards.
        sizes: (S,) int64 bytes of each shard.
        shard: (N,) int32 number of the shard that holds id i.
        offset: (N,) int64 first byte of its payload.
        length: (N,) int64 bytes of its payload.
    """

    root: Path
    names: tuple[str, ...]
    sizes: np.ndarray
    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    _open: dict[int, int] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read(self, sample_id: int) -> np.ndarray:
        """Return the encoded image of an id, (bytes,) uint8; raises OSError as a file would."""
        number, length = int(self.shard[sample_id]), int(self.length[sample_id])
        data = os.pread(self._descriptor(number), length, int(self.offset[sample_id]))
        if len(data) != length:
            raise OSError(f"{self.names[number]} ends inside image {sample_id}")
        return np.frombuffer(data, dtype=np.uint8)

    def place(self, sample_id: int) -> str:
        """Return where an id lies, for messages."""
        return f"{self.root / self.names[int(self.shard[sample_id])]} at byte {int(self.offset[sample_id])}"

    def _descriptor(self, number: int) -> int:
        with self._lock:
            if number not in self._open:
                self._open[number] = os.open(self.root / self.names[number], os.O_RDONLY | os.O_NOFOLLOW)
            return self._open[number]

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def __del__(self) -> None:
        self.close()
