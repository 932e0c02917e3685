"""Views of training images against their laws written out one image and one try at a time, from the same counters."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest

from distributed_at.config import AugmentConfig
from distributed_at.data.augment import Views, centre_views, flips, pad_crop_flip, random_resized_views, training_views
from distributed_at.rng import Purpose, below, uniform

SEED, EPOCH, SIZE = 3, 5, 24


def plain_window(sample: int, height: int, width: int, area, aspect):
    """Top, left, height, width of the first of ten tries that fits; None where none does."""
    draws = uniform(SEED, Purpose.CROP, EPOCH, np.array([sample]), 50)[0].astype(np.float64)
    for attempt in range(10):
        share, shape, swap, top, left = draws[5 * attempt : 5 * attempt + 5]
        pixels = (area[0] + share * (area[1] - area[0])) * height * width
        ratio = aspect[0] + shape * (aspect[1] - aspect[0])
        w, h = math.floor(math.sqrt(pixels * ratio) + 0.5), math.floor(math.sqrt(pixels / ratio) + 0.5)
        if swap < 0.5:
            w, h = h, w
        if 0 < w <= width and 0 < h <= height:
            return [math.floor(top * (height - h + 1)), math.floor(left * (width - w + 1)), h, w]
    return None


@pytest.mark.parametrize(
    ("area", "aspect"),
    [((0.08, 1.0), (0.75, 4 / 3)), ((0.9, 1.0), (0.95, 1.05)), ((0.001, 0.05), (0.5, 3.0)), ((1.0, 1.0), (1.0, 1.0))],
)
def test_every_random_window_is_the_one_that_the_plain_law_gives(area, aspect):
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 40, 300), rng.integers(1, 40, 300)
    heights[:100] = widths[:100] = rng.integers(1, 6, 100)
    ids = np.arange(300) + 1000
    views = random_resized_views(ids, heights, widths, epoch=EPOCH, seed=SEED, size=SIZE, area=area, aspect=aspect)
    centre = centre_views(heights, widths, shortest_edge=SIZE, size=SIZE)
    found = 0
    for k, (sample, height, width) in enumerate(zip(ids.tolist(), heights.tolist(), widths.tolist(), strict=True)):
        window = plain_window(sample, height, width, area, aspect)
        found += window is not None
        assert views.windows[k].tolist() == (window or [0, 0, height, width])
        assert views.resized[k].tolist() == ([SIZE, SIZE] if window else centre.resized[k].tolist())
        assert views.corners[k].tolist() == ([0, 0] if window else centre.corners[k].tolist())
    assert 60 < found <= 300
    assert not views.flips.any()


def test_edges_are_resized_to_the_nearest_pixel_with_halves_up():
    sizes = [(h, w) for h in range(1, 24) for w in range(1, 24)]
    heights, widths = np.array(sizes).T
    views = centre_views(heights, widths, shortest_edge=9, size=7)
    by_hand = [[math.floor(edge * 9 / min(pair) + 0.5) for edge in pair] for pair in sizes]
    assert views.resized.tolist() == by_hand
    assert views.corners.tolist() == [[(edge - 7) // 2 for edge in pair] for pair in by_hand]
    assert views.windows.tolist() == [[0, 0, h, w] for h, w in sizes]
    assert centre_views(heights, widths, shortest_edge=7, size=7).resized.min() == 7


def test_which_images_are_mirrored_never_changes():
    """A run that goes on under a later version must see the same images."""
    ids = np.arange(24)
    assert np.flatnonzero(flips(ids, epoch=0, seed=0)).tolist() == [4, 10, 12, 13, 14, 18, 20, 23]
    np.testing.assert_array_equal(flips(ids, epoch=2, seed=7), below(2, 7, Purpose.FLIP, 2, ids, 1)[:, 0] == 1)


def test_defaults_are_the_recipes_own():
    defaults = {k: p.default for k, p in inspect.signature(random_resized_views).parameters.items()}
    assert defaults["area"] == AugmentConfig().area == (0.08, 1.0)
    assert defaults["aspect"] == AugmentConfig().aspect == (3 / 4, 4 / 3)


@pytest.mark.parametrize(("flip", "crop"), [(True, "random_resized"), (False, "random_resized"), (True, "none")])
def test_training_views_are_the_windows_with_the_flips(flip, crop):
    ids, heights, widths = np.arange(30), np.full(30, 20), np.full(30, 31)
    augment = AugmentConfig(crop=crop, flip=flip, area=(0.3, 0.6), aspect=(0.9, 1.2))
    views = training_views(ids, heights, widths, epoch=EPOCH, seed=SEED, augment=augment, size=16, shortest_edge=18)
    if crop == "none":
        expected = centre_views(heights, widths, shortest_edge=18, size=16)
    else:
        expected = random_resized_views(
            ids, heights, widths, epoch=EPOCH, seed=SEED, size=16, area=(0.3, 0.6), aspect=(0.9, 1.2)
        )
    for name in ("windows", "resized", "corners"):
        np.testing.assert_array_equal(getattr(views, name), getattr(expected, name))
    np.testing.assert_array_equal(views.flips, flips(ids, epoch=EPOCH, seed=SEED) & flip)
    assert views.size == 16


def test_views_are_taken_by_position():
    views = centre_views(np.arange(8, 16), np.arange(20, 28), shortest_edge=8, size=8)
    views = Views(**{**vars(views), "flips": np.arange(8) % 3 == 0})
    some = views.take(np.array([5, 0]))
    assert len(some) == 2
    assert some.size == 8
    for name in ("windows", "resized", "corners", "flips"):
        np.testing.assert_array_equal(getattr(some, name), getattr(views, name)[[5, 0]])


@pytest.mark.parametrize("mode", ["zero", "reflect"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("crop", ["pad", "none"])
def test_every_pixel_of_a_padded_crop_is_the_one_that_the_counters_say(mode, flip, crop):
    images = np.random.default_rng(1).integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
    rows, ids, pad = np.array([4, 0, 2, 5] * 20), np.arange(80) + 9, 3
    augment = AugmentConfig(crop=crop, pad=pad, pad_mode=mode, flip=flip)
    out = pad_crop_flip(images, rows, ids, epoch=EPOCH, seed=SEED, augment=augment)
    shift = below(2 * pad + 1, SEED, Purpose.CROP, EPOCH, ids, 2) - pad if crop == "pad" else np.zeros((80, 2), int)
    mirrored = flips(ids, epoch=EPOCH, seed=SEED) & flip
    for k in range(80):
        wide = np.pad(images[rows[k]], ((pad, pad), (pad, pad), (0, 0)), mode="constant" if mode == "zero" else mode)
        top, left = pad + shift[k]
        wide, left = (wide[:, ::-1], pad - shift[k, 1]) if mirrored[k] else (wide, left)  # mirrored first, then cut
        window = wide[top : top + 5, left : left + 7]
        np.testing.assert_array_equal(out[k], window)


def test_a_reflecting_pad_may_be_one_less_than_the_image():
    images = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
    augment = AugmentConfig(crop="pad", pad=3, pad_mode="reflect")
    out = pad_crop_flip(images, np.zeros(200, int), np.arange(200), epoch=0, seed=0, augment=augment)
    assert set(np.unique(out)) <= set(range(16))
    assert out.shape == (200, 4, 4, 1)
