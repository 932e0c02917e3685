"""Counter-based random numbers: every draw is a pure function of (seed, purpose, epoch, sample_id, index).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with
key = (seed low, seed high) and counter = (block, sample_id, epoch, purpose + 256 * draw). Element ``i`` of a sample
is word ``i % 4`` of block ``i // 4``. The numpy and the torch (CPU and CUDA) versions give the same bits; the kernels
in ``kernels/`` follow the same layout. Nothing here has state, so nothing here needs saving.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TypeVar

import numpy as np
import torch

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_SHUFFLE_ROUNDS, _LEAST_BITS = 8, 6

# Evaluation draws live in their own epochs, so that no evaluation repeats a start that training saw.
EVALUATION_EPOCH = 0x80000000

_Array = TypeVar("_Array", np.ndarray, torch.Tensor)


class Purpose(IntEnum):
    """What a draw is for; two purposes never share a number. Values are part of the file format: never renumber."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    COLOUR = 4
    TARGET = 5
    CLEAN_START = 6
    START = 7
    EXTRA_MIX = 8
    SPLIT = 9
    CLEAN_SUBSET = 10
    START_RADIUS = 11
    CHANNELS = 12
    DROPOUT = 13
    STEP_NOISE = 14


def _round_keys(seed: int) -> list[tuple[int, int]]:
    low, high = seed & _MASK, (seed >> 32) & _MASK
    return [((low + r * _WEYL[0]) & _MASK, (high + r * _WEYL[1]) & _MASK) for r in range(_ROUNDS)]


def _multiply_high_low(constant: int, word: _Array) -> tuple[_Array, _Array]:
    """32 x 32 -> 64 bit product of a constant and words held in int64, as (high word, low word).

    int64 is the one integer type that torch computes with everywhere; the word is split so that no partial product
    passes 2^48.
    """
    low_part = constant * (word & 0xFFFF)
    high_part = constant * (word >> 16)
    high = (high_part + (low_part >> 16)) >> 16
    low = (((high_part & 0xFFFF) << 16) + low_part) & _MASK
    return high, low


def philox4x32(counter: tuple[_Array, _Array, _Array, _Array], seed: int) -> tuple[_Array, ...]:
    """Apply Philox4x32-10 to four broadcastable int64 arrays of 32-bit words; return four arrays of words (int64).

    Works on numpy arrays and on torch tensors of any device, with the same bits.
    """
    c0, c1, c2, c3 = counter
    for key0, key1 in _round_keys(seed):
        high0, low0 = _multiply_high_low(_MULTIPLIER[0], c0)
        high1, low1 = _multiply_high_low(_MULTIPLIER[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
    return c0, c1, c2, c3


def _purpose_word(purpose: Purpose, draw: int) -> int:
    if not 0 <= draw < 1 << 24:
        raise ValueError(f"draw must be in [0, 2^24), got {draw}")
    return int(purpose) + 256 * draw


def words(seed: int, purpose: Purpose, epoch: int, sample_ids: _Array, count: int, *, draw: int = 0) -> _Array:
    """Return ``count`` random 32-bit words for each sample.

    Args:
        seed: the run's seed, 64 bits.
        purpose: what the words are for.
        epoch: the epoch, or ``EVALUATION_EPOCH``.
        sample_ids: (N,) int64, numpy array or tensor, each in [0, 2^32).
        count: words per sample.
        draw: number of a repeated draw for the same sample and epoch (a restart).

    Returns:
        (N, count) int64 of values in [0, 2^32), of the kind and on the device of ``sample_ids``.
    """
    blocks = (count + 3) // 4
    n = sample_ids.shape[0]
    if isinstance(sample_ids, torch.Tensor):
        device = sample_ids.device
        ids = sample_ids.to(torch.int64).view(-1, 1).expand(n, blocks)
        block = torch.arange(blocks, dtype=torch.int64, device=device).view(1, -1).expand(n, blocks)
        epoch_word = torch.full((1, 1), epoch & _MASK, dtype=torch.int64, device=device).expand(n, blocks)
        purpose_word = torch.full_like(epoch_word, _purpose_word(purpose, draw))
        out = philox4x32((block, ids, epoch_word, purpose_word), seed)
        return torch.stack(out, dim=-1).reshape(n, blocks * 4)[:, :count]
    ids = np.broadcast_to(np.asarray(sample_ids, dtype=np.int64).reshape(-1, 1), (n, blocks))
    block = np.broadcast_to(np.arange(blocks, dtype=np.int64).reshape(1, -1), (n, blocks))
    epoch_word = np.broadcast_to(np.int64(epoch & _MASK), (n, blocks))
    purpose_word = np.broadcast_to(np.int64(_purpose_word(purpose, draw)), (n, blocks))
    out = philox4x32((block, ids, epoch_word, purpose_word), seed)
    return np.stack(out, axis=-1).reshape(n, blocks * 4)[:, :count]


def uniform(seed: int, purpose: Purpose, epoch: int, sample_ids: _Array, count: int, *, draw: int = 0) -> _Array:
    """Return (N, count) float32 in [0, 1): the top 24 bits of each word, so exact in float32 and equal everywhere."""
    top = words(seed, purpose, epoch, sample_ids, count, draw=draw) >> 8
    if isinstance(top, torch.Tensor):
        return top.to(torch.float32) * 2.0**-24
    return top.astype(np.float32) * np.float32(2.0**-24)


def below(
    limit: int, seed: int, purpose: Purpose, epoch: int, sample_ids: _Array, count: int, *, draw: int = 0
) -> _Array:
    """Return (N, count) int64 uniform in [0, limit), for 1 <= limit <= 2^31 (bias below limit / 2^32)."""
    if not 1 <= limit <= 1 << 31:
        raise ValueError(f"limit must be in [1, 2^31], got {limit}")
    return (words(seed, purpose, epoch, sample_ids, count, draw=draw) * limit) >> 32


def normal(
    seed: int, purpose: Purpose, epoch: int, sample_ids: torch.Tensor, count: int, *, draw: int = 0
) -> torch.Tensor:
    """Return (N, count) float32 standard normal by Box-Muller on pairs of counter words.

    The words are equal on every device; log and cosine are not, so normals agree between devices to float32 rounding.
    """
    pairs = uniform(seed, purpose, epoch, sample_ids, 2 * ((count + 1) // 2), draw=draw)
    first, second = pairs[:, 0::2], pairs[:, 1::2]
    radius = torch.sqrt(-2.0 * torch.log(first + 2.0**-25))  # never log(0)
    angle = 2.0 * torch.pi * second
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).reshape(len(pairs), -1)[
        :, :count
    ]


def permuted(positions: np.ndarray, num_samples: int, seed: int, epoch: int, *, purpose: Purpose) -> np.ndarray:
    """Return what a random order of ``range(num_samples)`` holds at some positions, without the whole order in memory.

    A Feistel network over the smallest power of two that holds ``num_samples`` (at least 64), whose outputs outside of the
    range are put through it again until they fall inside (Black & Rogaway, "Ciphers with arbitrary finite domains", 2002):
    a bijection, so over all positions each sample comes once. Its round keys are words of these counters.

    Args:
        positions: (N,) int64 in [0, num_samples).
        num_samples: at most 2^32.
        seed, epoch, purpose: the counters; each epoch has an order of its own.

    Returns:
        (N,) int64 in [0, num_samples).
    """
    if not 1 <= num_samples <= 1 << 32:
        raise ValueError(f"num_samples must be in [1, 2^32], got {num_samples}")
    positions = np.asarray(positions, dtype=np.int64)
    if len(positions) and not 0 <= positions.min() <= positions.max() < num_samples:
        raise ValueError(f"positions lie in [0, {num_samples})")
    bits = max((num_samples - 1).bit_length(), _LEAST_BITS)
    keys = words(seed, purpose, epoch, np.arange(_SHUFFLE_ROUNDS, dtype=np.int64), 1)[:, 0]
    result = _feistel(positions, bits, keys)
    while len(outside := np.flatnonzero(result >= num_samples)):
        result[outside] = _feistel(result[outside], bits, keys)
    return result


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute values below 2^bits: two halves (of unequal size where ``bits`` is odd) are mixed into each other in turn."""
    low_bits = bits // 2
    low, high = values & ((1 << low_bits) - 1), values >> low_bits
    for number, key in enumerate(keys.tolist()):
        if number % 2 == 0:
            high = high ^ (_mixed(low ^ key) & ((1 << (bits - low_bits)) - 1))
        else:
            low = low ^ (_mixed(high ^ key) & ((1 << low_bits) - 1))
    return (high << low_bits) | low


def _mixed(word: np.ndarray) -> np.ndarray:
    """Return the finaliser of MurmurHash3 of 32-bit words, in which every bit depends on every other."""
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _MASK
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _MASK
    return word ^ (word >> 16)


def permutation(seed: int, epoch: int, num_samples: int, *, purpose: Purpose = Purpose.ORDER) -> np.ndarray:
    """Return a uniformly random order of ``range(num_samples)`` as (num_samples,) int64, a function of (seed, epoch)."""
    keys = words(seed, purpose, epoch, np.arange(num_samples, dtype=np.int64), 2)
    # ids break ties, so the order is defined even where two 64-bit keys are equal
    return np.lexsort((np.arange(num_samples), keys[:, 1], keys[:, 0])).astype(np.int64)
