"""Hypothesis strategies and comparisons shared by the tests of the fused operations."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import strategies as st

GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced")
SPECIAL = (0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -3.4e38)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors have equal dtype, shape and bits (all NaNs count as one)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {4: torch.int32, 2: torch.int16, 8: torch.int64}[a.element_size()]
    bits = [torch.where(t.isnan(), torch.full_like(t, math.nan), t).contiguous().view(integer) for t in (a, b)]
    return torch.equal(*bits)


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the values of ``x`` in another memory layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.zeros((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x.contiguous()


@st.composite
def step_inputs(draw, *, special: bool = True, min_batch: int = 0):
    """Draw x_adv, clean, grad (N, C, H, W) of one layout, eps and step."""
    shape = (draw(st.integers(min_batch, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    eps = draw(st.sampled_from([0.0, 2 / 255, 8 / 255, 0.3]) | st.floats(0, 1, width=32))
    step = draw(st.sampled_from([0.0, 1 / 255, 2 / 255]) | st.floats(0, 1, width=32))
    layout = draw(st.sampled_from(LAYOUTS))
    size = math.prod(shape)
    clean = torch.from_numpy(random.integers(0, 256, size, dtype=np.uint8))
    as_bytes = draw(st.booleans())
    pixels = torch.from_numpy(random.random(size, dtype=np.float32))
    base = (clean / 255).float() if as_bytes else pixels
    x_adv = base + torch.from_numpy(random.uniform(-2, 2, size).astype(np.float32)) * eps
    grad = torch.from_numpy(random.standard_normal(size).astype(np.float32)) * 10 ** draw(st.integers(-6, 3))
    if special and size:
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
            grad[int(random.integers(size))] = value
        if draw(st.booleans()):
            x_adv[int(random.integers(size))] = draw(st.sampled_from([-0.0, 0.0, 1.0, math.nan]))
    grad = grad.to(draw(st.sampled_from(GRAD_DTYPES)))
    tensors = [lay_out(t.view(shape), layout) for t in (x_adv, clean if as_bytes else pixels, grad)]
    return (*tensors, eps, step)
