"""What float32 means on a GPU: 24 bits of mantissa, or TF32's 11 where convolutions and matrix products may round to them.

PyTorch lets convolutions use TF32 unless told otherwise. Attacks then depend on the batch they come in: on an H200, PGD's
result differs in 8 % (batch norm) to 22 % (group norm) of its pixels between batches of 8 and of 16 images, and in none
in float32 (``benchmarks/results/gpu_h200.json``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def allow_tf32(enabled: bool) -> None:
    """Let convolutions and matrix products of this process use TF32, or not; only CUDA devices of 2020 and later have it."""
    # the older of two spellings: torch refuses to read it once the newer one has been written
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = enabled


@contextlib.contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Allow or forbid TF32 within the block."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    allow_tf32(enabled)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
