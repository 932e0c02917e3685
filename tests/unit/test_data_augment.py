"""Views and colour as pure functions of counters, and their laws."""

import numpy as np
import pytest

from distributed_at.config import AugmentConfig
from distributed_at.data.augment import centre_views, flips, pad_crop_flip, random_resized_views, training_views
from distributed_at.data.colour import apply_jitter, jitter_batch, jitters
from distributed_at.errors import ConfigError


def _images(n=40, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def _augmented(images, ids, augment, epoch=2, seed=9):
    return pad_crop_flip(images, ids, ids, epoch=epoch, seed=seed, augment=augment)


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_padded_crop_equals_numpy_pad_then_crop_then_flip(mode):
    """The vectorised gather against the textbook construction, for windows found by search."""
    images, ids = _images(), np.arange(40)
    out = _augmented(images, ids, AugmentConfig(crop="pad", pad=3, pad_mode=mode, flip=True))
    mirrored = flips(ids, epoch=2, seed=9)
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="constant" if mode == "zero" else "reflect")
    for i in ids:
        windows = [padded[i, y : y + 16, x : x + 16] for y in range(7) for x in range(7)]
        if mirrored[i]:
            windows = [w[:, ::-1] for w in windows]
        assert sum(np.array_equal(out[i], w) for w in windows) == 1


def test_padded_crop_reaches_every_position_about_equally():
    marked = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    marked[0, 4, 4] = 255
    rows, ids = np.zeros(4000, dtype=np.int64), np.arange(4000)
    out = pad_crop_flip(marked, rows, ids, epoch=0, seed=0, augment=AugmentConfig(crop="pad", pad=2))
    y, x = np.unravel_index(out[..., 0].reshape(4000, -1).argmax(axis=1), (8, 8))
    counts = np.bincount((y - 2) * 5 + (x - 2), minlength=25)
    assert counts.sum() == 4000
    assert counts.min() > 100  # 160 expected, deviation 12
    assert counts.max() < 220


@pytest.mark.parametrize(
    "augment", [AugmentConfig(crop="pad", flip=True), AugmentConfig(crop="pad", pad_mode="reflect")]
)
def test_view_does_not_depend_on_batch_or_order(augment):
    images, ids = _images(), np.arange(40)
    whole = _augmented(images, ids, augment)
    np.testing.assert_array_equal(_augmented(images, ids[::-1].copy(), augment)[::-1], whole)
    np.testing.assert_array_equal(_augmented(images, ids[13:14], augment)[0], whole[13])
    assert not np.array_equal(_augmented(images, ids, augment, epoch=3), whole)
    assert not np.array_equal(_augmented(images, ids, augment, seed=8), whole)


def test_about_half_of_the_images_are_mirrored_and_not_the_same_half_each_epoch():
    ids = np.arange(20_000)
    first, second = flips(ids, epoch=0, seed=0), flips(ids, epoch=1, seed=0)
    assert abs(first.mean() - 0.5) < 0.015
    assert abs((first == second).mean() - 0.5) < 0.015


def test_augmentation_switched_off_returns_the_image():
    images, ids = _images(), np.arange(40)
    np.testing.assert_array_equal(_augmented(images, ids, AugmentConfig()), images)


def test_crops_of_the_other_kind_of_data_are_refused():
    with pytest.raises(ConfigError, match="random_resized"):
        _augmented(_images(), np.arange(4), AugmentConfig(crop="random_resized"))
    with pytest.raises(ConfigError, match="pad"):
        training_views(
            np.arange(2), np.full(2, 50), np.full(2, 50), epoch=0, seed=0, augment=AugmentConfig(crop="pad"), size=8,
            shortest_edge=9,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="reflect"):
        _augmented(_images(size=8), np.arange(4), AugmentConfig(crop="pad", pad=8, pad_mode="reflect"))


def _windows(n, height, width, **options):
    size = {"size": 224, "epoch": 1, "seed": 3, **options}
    return random_resized_views(np.arange(n), np.full(n, height), np.full(n, width), **size)


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (60, 2000), (7, 7), (1, 900), (1, 1)])
def test_crop_windows_lie_inside_the_image(height, width):
    views = _windows(3000, height, width)
    y, x, h, w = views.windows.T
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (y + h <= height).all()
    assert (x + w <= width).all()
    assert (views.corners >= 0).all()
    assert (views.corners + 224 <= views.resized).all()


def test_crop_windows_follow_their_law():
    """On a square image nearly every first try fits: area uniform, aspect uniform in [3/4, 4/3] or its inverse."""
    views = _windows(20_000, 1000, 1000, area=(0.08, 0.5))
    y, x, h, w = views.windows.T.astype(float)
    share = h * w / 1e6
    assert abs(share.mean() - 0.29) < 0.003
    assert abs(np.quantile(share, 0.25) - (0.08 + 0.25 * 0.42)) < 0.006
    aspect = w / h
    assert aspect.min() > 0.745
    assert aspect.max() < 1.34
    # a uniform ratio in [3/4, 4/3], inverted half of the time: P(w > h) = 1/2, mean of w/h and of h/w are equal
    assert abs((aspect > 1).mean() - 0.5) < 0.015
    assert abs(aspect.mean() - (1 / aspect).mean()) < 0.006
    assert abs((y / (1000 - h)).mean() - 0.5) < 0.01
    assert abs((x / (1000 - w)).mean() - 0.5) < 0.01


def test_first_try_that_fits_is_taken_and_without_one_the_centre_is_cut():
    views = _windows(500, 30, 3000, area=(0.9, 1.0))  # no window of ordinary aspect holds 90 % of this strip
    np.testing.assert_array_equal(views.windows, np.tile([0, 0, 30, 3000], (500, 1)))
    np.testing.assert_array_equal(views.resized, np.tile([224, 22400], (500, 1)))
    np.testing.assert_array_equal(views.corners, np.tile([0, (22400 - 224) // 2], (500, 1)))


def test_evaluation_view_resizes_the_shortest_edge_and_cuts_the_centre():
    views = centre_views(np.array([375, 500, 256, 10]), np.array([500, 333, 256, 33]), shortest_edge=256, size=224)
    assert views.resized.tolist() == [[256, 341], [384, 256], [256, 256], [256, 845]]
    assert views.corners.tolist() == [[16, 58], [80, 16], [16, 16], [16, 310]]
    assert not views.flips.any()


def test_random_windows_do_not_depend_on_the_batch():
    heights, widths = np.array([375, 500, 90]), np.array([500, 333, 700])
    ids = np.array([4, 17, 2**31])
    options = {"epoch": 5, "seed": 1, "size": 224}
    whole = random_resized_views(ids, heights, widths, **options)
    for k in range(3):
        alone = random_resized_views(ids[k : k + 1], heights[k : k + 1], widths[k : k + 1], **options)
        np.testing.assert_array_equal(alone.windows[0], whole.windows[k])


def test_colour_does_not_depend_on_the_batch():
    images, ids = _images(9), np.arange(9) + 100
    whole = jitter_batch(images, ids, epoch=1, seed=2)
    for k in range(9):
        np.testing.assert_array_equal(jitter_batch(images[k : k + 1], ids[k : k + 1], epoch=1, seed=2)[0], whole[k])
    assert not np.array_equal(jitter_batch(images, ids, epoch=2, seed=2), whole)


def test_colour_parameters_follow_their_laws():
    many = jitters(np.arange(6000), epoch=0, seed=0)
    for field in ("brightness", "contrast", "saturation"):
        values = np.array([getattr(j, field) for j in many])
        assert values.min() >= 0.6
        assert values.max() < 1.4
        assert abs(values.mean() - 1) < 0.01
        assert abs(values.std() - 0.8 / np.sqrt(12)) < 0.01
    orders = {j.order for j in many}
    assert len(orders) == 24
    shifts = np.array([j.shift for j in many])
    assert np.abs(shifts.mean(axis=0)).max() < 0.3
    # std of the first channel: 0.1 * 255 * sqrt(sum over components of (eigenvalue * entry)^2)
    expected = 25.5 * np.sqrt((0.2175 * 0.5675) ** 2 + (0.0188 * 0.7192) ** 2 + (0.0045 * 0.4009) ** 2)
    assert abs(shifts[:, 0].std() / expected - 1) < 0.05


def test_every_colour_operation_truncates_to_uint8():
    """Against the operations written out per pixel, in the drawn order."""
    image, (jitter,) = _images(1, 6)[0], jitters(np.array([77]), epoch=0, seed=0)
    expected = image.astype(np.float64)
    for name in jitter.order:
        if name == "brightness":
            expected = expected * jitter.brightness
        elif name == "contrast":
            expected = expected * jitter.contrast + expected.mean(axis=(0, 1)) * (1 - jitter.contrast)
        elif name == "saturation":
            grey = np.floor(expected @ np.array([0.299, 0.587, 0.114]) + 0.5)[..., None]
            expected = expected * jitter.saturation + grey * (1 - jitter.saturation)
        else:
            expected = expected + np.array(jitter.shift)
        expected = np.floor(expected.clip(0, 255))
    difference = np.abs(apply_jitter(image, jitter).astype(float) - expected)
    assert difference.max() <= 1  # float32 in one operation, float64 here
    assert (difference == 0).mean() > 0.98
