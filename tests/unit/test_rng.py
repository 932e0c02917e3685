"""The counter-based generator: published known answers, equal bits everywhere, uniform, independent purposes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distributed_at import rng
from distributed_at.rng import Purpose

KNOWN_ANSWERS = [  # Random123 kat_vectors, philox4x32 10
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _hex(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_philox_gives_the_published_answers(counter: str, key: str, answer: str, kind: str) -> None:
    low, high = _hex(key)
    make = (lambda w: np.array([w], dtype=np.int64)) if kind == "numpy" else (lambda w: torch.tensor([w]))
    out = rng.philox4x32(tuple(make(w) for w in _hex(counter)), low | (high << 32))
    assert [int(word[0]) for word in out] == _hex(answer)


@pytest.mark.parametrize("count", [1, 3, 4, 7, 3072])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1])
def test_numpy_and_torch_give_the_same_bits(count: int, seed: int) -> None:
    ids = np.array([0, 1, 77, 2**31, 2**32 - 1], dtype=np.int64)
    for purpose in (Purpose.CROP, Purpose.START):
        a = rng.words(seed, purpose, 5, ids, count, draw=2)
        b = rng.words(seed, purpose, 5, torch.from_numpy(ids), count, draw=2)
        assert a.shape == (5, count)
        np.testing.assert_array_equal(a, b.numpy())
        u, v = rng.uniform(seed, purpose, 5, ids, count), rng.uniform(seed, purpose, 5, torch.from_numpy(ids), count)
        assert u.dtype == np.float32
        assert v.dtype == torch.float32
        np.testing.assert_array_equal(u, v.numpy())
        np.testing.assert_array_equal(
            rng.below(10, seed, purpose, 5, ids, count), rng.below(10, seed, purpose, 5, torch.from_numpy(ids), count)
        )


def test_words_follow_the_stated_layout() -> None:
    """Counter = (block, sample, epoch, purpose + 256 draw); element i is word i % 4 of block i // 4."""
    got = rng.words(9, Purpose.TARGET, 3, np.array([41], dtype=np.int64), 6, draw=4)[0]
    blocks = [
        rng.philox4x32(tuple(np.array([w], dtype=np.int64) for w in (block, 41, 3, int(Purpose.TARGET) + 1024)), 9)
        for block in (0, 1)
    ]
    assert got.tolist() == [int(w[0]) for block in blocks for w in block][:6]


def test_a_sample_does_not_depend_on_its_company() -> None:
    ids = torch.arange(50)
    whole = rng.words(1, Purpose.START, 2, ids, 10)
    assert torch.equal(whole[17:18], rng.words(1, Purpose.START, 2, torch.tensor([17]), 10))
    assert torch.equal(whole[:, :3], rng.words(1, Purpose.START, 2, ids, 3))


def test_uniform_is_uniform_and_never_one() -> None:
    u = rng.uniform(3, Purpose.START, 0, np.arange(400, dtype=np.int64), 500)
    assert u.min() >= 0
    assert u.max() < 1
    shares = np.histogram(u, bins=20, range=(0, 1))[0] / u.size
    assert np.abs(shares - 0.05).max() < 0.003
    assert abs(np.corrcoef(u[:, 0::2].ravel(), u[:, 1::2].ravel())[0, 1]) < 0.01


def test_below_covers_its_range_evenly() -> None:
    drawn = rng.below(7, 3, Purpose.TARGET, 0, np.arange(20000, dtype=np.int64), 1)[:, 0]
    assert np.abs(np.bincount(drawn, minlength=7) / 20000 - 1 / 7).max() < 0.01
    for bad in (0, 2**31 + 1):
        with pytest.raises(ValueError, match="limit"):
            rng.below(bad, 0, Purpose.TARGET, 0, np.arange(2), 1)


def test_normal_has_the_moments_of_a_normal() -> None:
    z = rng.normal(3, Purpose.START, 0, torch.arange(400), 501).double()
    assert z.shape == (400, 501)
    assert torch.isfinite(z).all()
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01
    assert abs((z**4).mean() - 3) < 0.1


@pytest.mark.parametrize("size", [1, 2, 997])
def test_permutation_is_a_permutation(size: int) -> None:
    order = rng.permutation(0, 0, size)
    assert sorted(order.tolist()) == list(range(size))


def test_permutations_of_epochs_and_seeds_differ() -> None:
    base = rng.permutation(0, 0, 500)
    for other in (rng.permutation(0, 1, 500), rng.permutation(1, 0, 500)):
        assert (base == other).mean() < 0.02
    places = np.stack([rng.permutation(0, e, 20) for e in range(2000)])
    counts = np.stack([np.bincount(places[:, i], minlength=20) for i in range(20)])
    assert np.abs(counts / 2000 - 0.05).max() < 0.025  # every sample is at every place equally often


def test_purposes_epochs_seeds_and_draws_are_independent() -> None:
    ids = np.arange(300, dtype=np.int64)
    streams = [rng.uniform(1, p, 4, ids, 40).ravel() for p in Purpose]
    streams += [
        rng.uniform(s, Purpose.START, e, ids, 40, draw=d).ravel() for s, e, d in ((2, 4, 0), (1, 5, 0), (1, 4, 1))
    ]
    correlation = np.corrcoef(np.stack(streams)) - np.eye(len(streams))
    assert np.abs(correlation).max() < 0.05


def test_purpose_numbers_never_change() -> None:
    """They are part of what makes an old run repeatable."""
    assert {p.name: int(p) for p in Purpose}.items() >= {
        "ORDER": 1, "CROP": 2, "FLIP": 3, "COLOUR": 4, "TARGET": 5, "CLEAN_START": 6, "START": 7, "EXTRA_MIX": 8,
        "SPLIT": 9, "CLEAN_SUBSET": 10, "START_RADIUS": 11, "CHANNELS": 12,
    }.items()  # fmt: skip
    assert len({int(p) for p in Purpose}) == len(list(Purpose))


def test_global_generators_are_untouched() -> None:
    before = torch.get_rng_state()
    rng.normal(0, Purpose.START, 0, torch.arange(4), 9)
    rng.permutation(0, 0, 9)
    assert torch.equal(before, torch.get_rng_state())


def test_too_many_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="draw"):
        rng.words(0, Purpose.START, 0, np.arange(2), 1, draw=1 << 24)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_normals_are_box_mullers_of_the_same_uniforms(count: int) -> None:
    ids = torch.arange(200)
    found = rng.normal(4, Purpose.START, 1, ids, count, draw=3)
    pairs = rng.uniform(4, Purpose.START, 1, ids, count + count % 2, draw=3).double().view(200, -1, 2)
    radius = (-2 * (pairs[..., 0] + 2.0**-25).log()).sqrt()
    angle = 2 * math.pi * pairs[..., 1]
    by_hand = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).view(200, -1)[:, :count]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_hand, rtol=0, atol=2e-5)


def test_a_uniform_of_zero_has_a_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "uniform", lambda *a, **k: torch.zeros(1, 2))
    assert rng.normal(0, Purpose.START, 0, torch.tensor([0]), 2)[0].tolist() == pytest.approx(
        [math.sqrt(50 * math.log(2)), 0]
    )


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_uniforms_are_the_top_24_bits_and_limits_scale_the_word(kind) -> None:
    ids = kind([3, 2**32 - 1])
    words = [[int(w) for w in row] for row in rng.words(6, Purpose.FLIP, 2, ids, 5)]
    assert rng.uniform(6, Purpose.FLIP, 2, ids, 5).tolist() == [[(w >> 8) / 2**24 for w in row] for row in words]
    for limit in (1, 2, 10, 2**31):
        assert rng.below(limit, 6, Purpose.FLIP, 2, ids, 5).tolist() == [
            [w * limit >> 32 for w in row] for row in words
        ]


def test_an_order_sorts_by_the_samples_two_words_and_then_by_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    words = rng.words(8, Purpose.SPLIT, 3, np.arange(50), 2).tolist()
    by_hand = sorted(range(50), key=lambda i: (words[i][0], words[i][1], i))
    assert rng.permutation(8, 3, 50, purpose=Purpose.SPLIT).tolist() == by_hand
    tied = np.array([[2, 1], [1, 5], [2, 0], [1, 5], [0, 9]])
    monkeypatch.setattr(rng, "words", lambda *a, **k: tied)
    assert rng.permutation(0, 0, 5).tolist() == [4, 1, 3, 2, 0]


def test_the_words_of_a_seed_use_all_its_64_bits_and_an_epoch_its_32() -> None:
    ids = np.arange(4)
    assert len({rng.words(seed, Purpose.ORDER, 0, ids, 4).tobytes() for seed in (0, 1, 2**31, 2**32, 2**63)}) == 5
    assert len({rng.words(0, Purpose.ORDER, epoch, ids, 4).tobytes() for epoch in (0, 1, rng.EVALUATION_EPOCH)}) == 3
    assert rng.EVALUATION_EPOCH == 2**31
    last = (1 << 24) - 1
    assert rng.words(0, Purpose.ORDER, 0, ids, 4, draw=last).shape == (4, 4)
    for draw in (-1, last + 1):
        with pytest.raises(ValueError, match="draw must be"):
            rng.words(0, Purpose.ORDER, 0, ids, 4, draw=draw)
