"""One function per fused operation; each chooses the compiled CPU or CUDA kernel, Triton, or plain torch by itself."""

from __future__ import annotations

from .attack_step import l2_step, linf_step, random_start
from .build import describe
from .group_norm import group_norm_relu

__all__ = ["describe", "group_norm_relu", "l2_step", "linf_step", "random_start"]
