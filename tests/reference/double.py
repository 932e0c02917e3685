"""Runs the product's own training in float64: whatever it and DeepSpeed call 32-bit is then 64-bit, and nothing else changes.

In float64 a difference between two loops is either a difference of formulas or far below 1e-10; in float32 the attack's
sign would turn rounding into other images within a few steps.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from distributed_at.batch import Batch


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Within it networks are built, images handed out, gradients reduced and weights kept in float64."""
    plain_init = DeepSpeedZeroOptimizer.__init__

    @functools.wraps(plain_init)
    def init(self: Any, *arguments: Any, **options: Any) -> None:
        plain_init(self, *arguments, **{**options, "gradient_accumulation_dtype": torch.float64})

    plain_float = torch.Tensor.float
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            # pixels are float32 quotients of bytes; from here on they are computed with in float64
            mock.patch("distributed_at.engine.microbatches.Batch", _batch_in_float64),
            # "make 16 bits 32", said of 64
            mock.patch.object(
                torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else plain_float(self)
            ),
            mock.patch.object(DeepSpeedEngine, "communication_data_type", torch.float64),
            mock.patch.object(DeepSpeedZeroOptimizer, "__init__", init),
            mock.patch.object(type(get_accelerator()), "supported_dtypes", return_value=[torch.float64]),
            mock.patch.object(DeepSpeedZeroOptimizer, "_configure_master_weights", return_value=torch.float64),
        ):
            yield
    finally:
        torch.set_default_dtype(default)


def _batch_in_float64(*, images: torch.Tensor, **others: Any) -> Batch:
    return Batch(images=images.double(), **others)
