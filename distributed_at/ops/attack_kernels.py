"""The custom ops behind ``attack_step.py``: their shapes for torch.compile and their calls into the compiled kernels.

Arguments are checked before they come here. Each op's own body is the plain torch reference, for any device; the kernels
registered for ``cpu`` and ``cuda`` replace it where they are built.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch

from .. import rng
from . import build, reference

_TYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    if not x.is_contiguous() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _same_layout(reference_tensor: torch.Tensor, *others: torch.Tensor) -> tuple[bool, list[torch.Tensor]]:
    """Return whether the layout is channels-last, and all tensors in that layout (copied only where they are not)."""
    memory_format = _memory_format(reference_tensor)
    tensors = [t.contiguous(memory_format=memory_format) for t in (reference_tensor, *others)]
    return memory_format is torch.channels_last, tensors


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.float32, memory_format=_memory_format(x))


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _typed(tensor: torch.Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int]:
    return _address(tensor), ctypes.c_int(_TYPE_NUMBERS[tensor.dtype])


def _floats(*values: float) -> list[ctypes.c_float]:
    return [ctypes.c_float(value) for value in values]


def _sizes(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


def _backend(x: torch.Tensor) -> str:
    """Name the family of kernels that serves ``x``; a test puts the emulated CUDA kernels here."""
    return x.device.type


def _call(function: str, x: torch.Tensor, *arguments: object) -> None:
    """Call a kernel for ``x``: on CUDA on the current stream of its device, the stream being the last argument."""
    backend = _backend(x)
    name = f"dat_{backend}_{function}"
    kernel = getattr(build.library(backend), name)
    if x.is_cuda:
        with torch.cuda.device(x.device):
            status = kernel(*arguments, ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream))
    else:
        status = kernel(*arguments, *([ctypes.c_void_p(None)] if backend == "cuda" else []))
    if status != 0:
        raise RuntimeError(f"kernel {name} failed with status {status} (positive: a cudaError_t)")


@torch.library.custom_op("distributed_at::linf_step", mutates_args=())
def linf_step(
    x_adv: torch.Tensor, clean: torch.Tensor, grad: torch.Tensor, eps: torch.Tensor, step: torch.Tensor,
    direction: float, low: float, high: float,
) -> torch.Tensor:  # fmt: skip
    return reference.linf_step(x_adv, clean, grad, eps, step, direction, (low, high)).contiguous(
        memory_format=_memory_format(x_adv)
    )


@linf_step.register_fake
def _(x_adv: Any, clean: Any, grad: Any, eps: Any, step: Any, direction: Any, low: Any, high: Any) -> Any:
    return _empty(x_adv)


@linf_step.register_kernel(("cpu", "cuda"))
def _(x_adv: Any, clean: Any, grad: Any, eps: Any, step: Any, direction: Any, low: Any, high: Any) -> Any:
    if build.library(_backend(x_adv)) is None:
        return linf_step._init_fn(x_adv, clean, grad, eps, step, direction, low, high)
    _, (x, c, g) = _same_layout(x_adv, clean, grad)
    out = _empty(x)
    shared = (_address(x), *_typed(c), *_typed(g), _address(eps), _address(step), *_floats(direction, low, high))
    span = _sizes(0, x.numel()) if _backend(x) == "cpu" else _sizes(x.numel())
    _call("linf_step", x, _address(out), *shared, *span)
    return out


@torch.library.custom_op("distributed_at::l2_step", mutates_args=())
def l2_step(
    x_adv: torch.Tensor, clean: torch.Tensor, grad: torch.Tensor, eps: torch.Tensor, step: torch.Tensor,
    direction: float, low: float, high: float,
) -> torch.Tensor:  # fmt: skip
    return reference.l2_step(x_adv, clean, grad, eps, step, direction, low, high).contiguous(
        memory_format=_memory_format(x_adv)
    )


@l2_step.register_fake
def _(x_adv: Any, clean: Any, grad: Any, eps: Any, step: Any, direction: Any, low: Any, high: Any) -> Any:
    return _empty(x_adv)


@l2_step.register_kernel(("cpu", "cuda"))
def _(x_adv: Any, clean: Any, grad: Any, eps: Any, step: Any, direction: Any, low: Any, high: Any) -> Any:
    kernels = build.library(_backend(x_adv))
    if kernels is None:
        return l2_step._init_fn(x_adv, clean, grad, eps, step, direction, low, high)
    _, (x, c, g) = _same_layout(x_adv, clean, grad)
    out = _empty(x)
    if x.numel() == 0:
        return out
    shape = _sizes(x.shape[0], x.numel() // x.shape[0])
    scratch: tuple[ctypes.c_void_p, ...] = ()
    if _backend(x) == "cuda":
        kernels.dat_cuda_l2_scratch.restype = ctypes.c_int64
        sums = torch.empty(kernels.dat_cuda_l2_scratch(*shape), dtype=torch.float64, device=x.device)
        scratch = (_address(sums),)
    shared = (_address(x), *_typed(c), *_typed(g), _address(eps), _address(step), *_floats(direction, low, high))
    _call("l2_step", x, _address(out), *scratch, *shared, *shape)
    return out


@torch.library.custom_op("distributed_at::random_start", mutates_args=())
def random_start(
    clean: torch.Tensor, sample_ids: torch.Tensor, coin_ids: torch.Tensor, eps: torch.Tensor, seed: int, epoch: int,
    draw: int, clean_probability: float, clip: bool, low: float, high: float,
) -> torch.Tensor:  # fmt: skip
    return reference.random_start(
        clean, sample_ids, coin_ids, eps, seed=seed, epoch=epoch, draw=draw, clean_probability=clean_probability,
        clip=clip, box=(low, high),
    ).contiguous(memory_format=_memory_format(clean))  # fmt: skip


@random_start.register_fake
def _(
    clean: Any,
    sample_ids: Any,
    coin_ids: Any,
    eps: Any,
    seed: Any,
    epoch: Any,
    draw: Any,
    clean_probability: Any,
    clip: Any,
    low: Any,
    high: Any,
) -> Any:
    return _empty(clean)


@random_start.register_kernel(("cpu", "cuda"))
def _(
    clean: Any,
    sample_ids: Any,
    coin_ids: Any,
    eps: Any,
    seed: Any,
    epoch: Any,
    draw: Any,
    clean_probability: Any,
    clip: Any,
    low: Any,
    high: Any,
) -> Any:
    if build.library(_backend(clean)) is None:
        return random_start._init_fn(
            clean, sample_ids, coin_ids, eps, seed, epoch, draw, clean_probability, clip, low, high
        )
    channels_last, (c,) = _same_layout(clean)
    ids, coins = (t.to(clean.device).contiguous() for t in (sample_ids, coin_ids))
    out = _empty(c)
    if c.numel() == 0:
        return out
    channels = c.shape[1] if channels_last else 1
    count = c.numel() // c.shape[0]
    # the purpose word of rng.py: purpose + 256 * draw
    purposes = [ctypes.c_uint32(int(p) + 256 * draw) for p in (rng.Purpose.START, rng.Purpose.CLEAN_START)]
    _call(
        "random_start", c, _address(out), *_typed(c), _address(ids), _address(coins),
        ctypes.c_uint64(seed & ((1 << 64) - 1)), ctypes.c_uint32(epoch & 0xFFFFFFFF), *purposes,
        *_floats(clean_probability), _address(eps), *(_floats(low, high) if clip else _floats(-math.inf, math.inf)),
        *_sizes(c.shape[0], channels, count // channels), ctypes.c_int(channels_last),
    )  # fmt: skip
    return out
