"""The attack's pixel operations: l-infinity step, l2 step and random start, each one fused pass per call.

Public functions check arguments and call a torch custom op; the op is served by the compiled CPU or CUDA kernel, or by
plain torch (``reference.py``) where there is none. Losses, models and the attack's loop live elsewhere.
"""

from __future__ import annotations

import numpy as np
import torch

from . import attack_kernels as kernels
from . import build, reference

_GRAD_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_CLEAN_TYPES = (torch.float32, torch.uint8)

Scalar = float | torch.Tensor
Box = tuple[float, float]


def linf_step(
    x_adv: torch.Tensor,
    clean: torch.Tensor,
    grad: torch.Tensor,
    *,
    eps: Scalar,
    step: Scalar,
    direction: float,
    box: Box = (0.0, 1.0),
) -> torch.Tensor:
    """Return clip(x_adv - direction * step * sign(grad), max(clean - eps, low), min(clean + eps, high)).

    One clip suffices: ball and box are intervals (Xie & Yuille's code precomputes the same two bounds). A bound that
    rounds out of the ball moves one float inwards, so the ball holds exactly. sign is 0 for zero and NaN and +-1 for
    infinities. The float32 result has the same bits from every implementation.

    Args:
        x_adv: (N, ...) float32 in [0, 1] units; contiguous and channels-last tensors are not copied.
        clean: like ``x_adv``, float32, or uint8 in 0..255.
        grad: like ``x_adv``, float32, bfloat16 or float16: the loss's gradient at ``x_adv``.
        eps: radius in [0, 1] units, a number or a 0-dim tensor (a tensor is not a constant to torch.compile).
        step: step size, likewise.
        direction: +1 descends the loss (towards a target class), -1 ascends it.
        box: lowest and highest pixel.

    Returns:
        A new tensor like ``x_adv``, in its memory format.

    Raises:
        ValueError: shapes differ, or ``direction`` is not +1 or -1.
        TypeError: a dtype that is not taken.
    """
    _check(x_adv, clean, grad, direction)
    scalars = _radius(eps, x_adv), _scalar(step, x_adv)
    if _plain(x_adv):
        return reference.linf_step(x_adv, clean, grad, *scalars, direction, box)
    return kernels.linf_step(x_adv, clean, grad, *scalars, direction, *map(float, box))


def l2_step(
    x_adv: torch.Tensor,
    clean: torch.Tensor,
    grad: torch.Tensor,
    *,
    eps: Scalar,
    step: Scalar,
    direction: float,
    box: Box = (0.0, 1.0),
) -> torch.Tensor:
    """Move by ``step`` along grad / ||grad||_2 of each sample, project on the l2 ball, then on the box.

    The step of Pang et al. ("Bag of Tricks for AT", attack_pgd) without the 1e-10 that their code adds to the norm: a
    zero gradient makes no step by definition. A NaN in the gradient counts as 0 and an infinity as the largest float32,
    so that the direction stays finite. A point inside the ball is not moved by the projection; the box comes last, and
    can only bring a point nearer to a clean image inside the box. Ball and box hold exactly.

    Norms are summed in float64, in an order that depends on the shape alone, so that repeated calls give the same bits
    whatever the threads. Implementations differ in that order: their results agree to 2^-22.

    Arguments, result and errors are those of ``linf_step``; ``eps`` is the l2 radius and ``step`` the l2 length.
    """
    _check(x_adv, clean, grad, direction)
    scalars = _radius(eps, x_adv), _scalar(step, x_adv)
    if _plain(x_adv):
        return reference.l2_step(x_adv, clean, grad, *scalars, direction, *box)
    return kernels.l2_step(x_adv, clean, grad, *scalars, direction, *map(float, box))


def random_start(
    clean: torch.Tensor,
    sample_ids: torch.Tensor,
    *,
    eps: Scalar,
    seed: int,
    epoch: int,
    draw: int = 0,
    clean_probability: float = 0.0,
    coin_ids: torch.Tensor | None = None,
    clip: bool = True,
    box: Box = (0.0, 1.0),
) -> torch.Tensor:
    """Return clean + eps * (2u - 1) with u from ``rng.uniform(seed, Purpose.START, epoch, sample_ids)``.

    Element i of a sample in (C, H, W) order takes number i, whatever the memory format, batch, rank or device; the
    float32 result has the same bits from every implementation.

    Args:
        clean: (N, ...) float32 in [0, 1], or uint8 in 0..255.
        sample_ids: (N,) int64 in [0, 2^32).
        eps: radius in [0, 1] units, a number or a 0-dim tensor.
        seed: the run's seed. epoch: the epoch, or ``rng.EVALUATION_EPOCH``. draw: number of the restart.
        clean_probability: a sample starts at its clean image where ``Purpose.CLEAN_START``'s number of its coin id is
            below this (Xie & Yuille use 0.2).
        coin_ids: (N,) int64 whose coin decides; ``sample_ids`` where each sample tosses its own.
        clip: whether to clip to ``box`` (Xie & Yuille's code and TRADES do not).
        box: lowest and highest pixel.

    Returns:
        (N, ...) float32 in the memory format of ``clean``.

    Raises:
        ValueError, TypeError: shapes, ids, a probability or a dtype that is not taken.
    """
    coins = sample_ids if coin_ids is None else coin_ids
    for name, ids in (("sample_ids", sample_ids), ("coin_ids", coins)):
        if ids.shape != (clean.shape[0],) or ids.dtype != torch.int64:
            raise ValueError(f"{name} must be ({clean.shape[0]},) int64, got {tuple(ids.shape)} {ids.dtype}")
    if not 0.0 <= clean_probability <= 1.0:
        raise ValueError(f"clean_probability must be in [0, 1], got {clean_probability}")
    if not 0 <= draw < 1 << 24:
        raise ValueError(f"draw must be in [0, 2^24), got {draw}")
    if clean.dtype not in (*_CLEAN_TYPES, torch.float64):
        raise TypeError(f"clean must be float32 or uint8, got {clean.dtype}")
    radius = _radius(eps, clean)
    if _plain(clean):
        return reference.random_start(
            clean, sample_ids, coins, radius, seed=seed, epoch=epoch, draw=draw,
            clean_probability=clean_probability, clip=clip, box=box,
        )  # fmt: skip
    seed &= (1 << 64) - 1
    signed_seed = seed - (1 << 64) if seed >= 1 << 63 else seed  # a custom op takes signed 64-bit integers
    return kernels.random_start(
        clean, sample_ids, coins, radius, signed_seed, epoch, draw, float(clean_probability), clip, *map(float, box)
    )


def _check(x_adv: torch.Tensor, clean: torch.Tensor, grad: torch.Tensor, direction: float) -> None:
    if clean.shape != x_adv.shape or grad.shape != x_adv.shape:
        raise ValueError(
            f"x_adv, clean and grad must have one shape, got {tuple(x_adv.shape)}, {tuple(clean.shape)} and "
            f"{tuple(grad.shape)}"
        )
    if direction not in (1, -1):
        raise ValueError(f"direction must be +1 (descend the loss) or -1 (ascend it), got {direction}")
    if x_adv.dtype == torch.float64:  # plain torch, for tests against finite differences
        return
    if x_adv.dtype != torch.float32 or clean.dtype not in _CLEAN_TYPES or grad.dtype not in _GRAD_TYPES:
        raise TypeError(
            "x_adv must be float32, clean float32 or uint8, grad float32, bfloat16 or float16; got "
            f"{x_adv.dtype}, {clean.dtype} and {grad.dtype}"
        )


@build.constant_to_compilers
def _round_down(value: float) -> float:
    """Return the largest float32 not above ``value``: |x_adv - clean| <= eps must hold for the number as written."""
    near = np.float32(value)
    return float(np.nextafter(near, np.float32(0)) if float(near) > value else near)


def _radius(eps: Scalar, like: torch.Tensor) -> torch.Tensor:
    """Return ``eps`` as ``_scalar`` does, rounded towards zero."""
    if not isinstance(eps, torch.Tensor):
        return _scalar(_round_down(eps) if like.dtype != torch.float64 else eps, like)
    if eps.dtype == torch.float64 and like.dtype != torch.float64:
        near = eps.detach().to(torch.float32)
        eps = torch.where(near.double() > eps, torch.nextafter(near, torch.zeros_like(near)), near)
    return _scalar(eps, like)


def _scalar(value: Scalar, like: torch.Tensor) -> torch.Tensor:
    """Return ``value`` as a 0-dim tensor on the device of ``like``; a number costs no copy from the host."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"eps and step must be numbers or 0-dim tensors, got shape {tuple(value.shape)}")
        return value.detach().reshape(()).to(device=like.device, dtype=dtype, non_blocking=True)
    return torch.full((), value, dtype=dtype, device=like.device)


def _plain(x: torch.Tensor) -> bool:
    """Return whether plain torch serves ``x``, so that torch.compile can fuse it instead of calling an opaque op."""
    return x.dtype == torch.float64 or (x.device.type != "meta" and not build.available(x.device.type))
