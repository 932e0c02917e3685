"""What a mixed batch shows, what its losses make of it, and what a recipe may ask for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distributed_at.batch import EXTRA, LABELLED, Batch
from distributed_at.config import AugmentConfig, DataConfig
from distributed_at.data import open_split
from distributed_at.data.augment import pad_crop_flip
from distributed_at.data.extra import ExtraSet
from distributed_at.data.mixed import Mixed
from distributed_at.data.mixed_order import MixedOrder
from distributed_at.data.packed import PackedImages
from distributed_at.data.packing import pack_extra
from distributed_at.data.uses import FIRST_EXTRA
from distributed_at.errors import ConfigError
from distributed_at.objectives.labels import SmoothedSection, cross_entropies, mean_cross_entropy
from distributed_at.recipes import load_recipe

AUGMENT = AugmentConfig(crop="pad", pad=1, flip=True)


@pytest.fixture
def mixed(tmp_path):
    """Digits beside 40 random images of one file; returns source, order, and the two sets as arrays."""
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), draw.integers(0, 10, 40)
    np.savez(tmp_path / "extra.npz", image=images, label=labels)
    pack_extra([tmp_path / "extra.npz"], tmp_path / "packed", shard_images=16)
    labelled = open_split(DataConfig(dataset="digits", image_size=8, augment=AUGMENT), "train", seed=3)
    order = MixedOrder(labelled.sample_ids, 40, 24, seed=3, copies=2, ratios=((0.0, 0.5),))
    extra = ExtraSet(PackedImages(tmp_path / "packed"), num_classes=10)
    return Mixed(labelled, extra, order.numbers), order, labelled, (images, labels)


def test_a_mixed_batch_shows_each_image_with_a_view_of_its_own_number(mixed):
    source, order, labelled, (images, labels) = mixed
    ids = order.ids(2, 5)
    views, found = source.read(ids, epoch=2, train=True, seed=3)
    everything = labelled._images
    for place, number in enumerate(ids.tolist()):
        one = np.array([number])
        if number >= FIRST_EXTRA:
            row = order.numbers.extra_rows(one)
            expected, label = pad_crop_flip(images, row, one, epoch=2, seed=3, augment=AUGMENT), labels[row[0]]
        else:
            row = order.numbers.labelled_ids(one)
            expected = pad_crop_flip(everything, row, one, epoch=2, seed=3, augment=AUGMENT)
            label = labelled.labels(row)[0]
        np.testing.assert_array_equal(views[place].permute(1, 2, 0).numpy(), expected[0])
        assert found[place] == label
    assert views.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(source.origins(ids) == EXTRA, ids >= FIRST_EXTRA)
    np.testing.assert_array_equal(source.labels(ids), found.numpy())


def test_copies_of_an_image_have_different_views(mixed):
    source, order, _, _ = mixed
    differing = 0
    for step in range(10):
        ids = order.ids(0, step)
        views, _ = source.read(ids, epoch=0, train=True)
        own = order.numbers.labelled_ids(ids)
        for place in np.flatnonzero(ids < FIRST_EXTRA):
            twin = [p for p in np.flatnonzero((own == own[place]) & (ids < FIRST_EXTRA)) if p != place]
            assert len(twin) == 1
            differing += not torch.equal(views[place], views[twin[0]])
    assert differing > 80  # of 120; windows of 9 places and a flip agree one time in 18, and digits have black borders


def test_extra_images_have_an_identity_of_their_own(mixed):
    source, _, labelled, _ = mixed
    found = source.identities()
    assert list(found) == ["train", "extra"]
    assert found["train"] == labelled.identity()
    assert (found["extra"].images, found["extra"].part) == (40, "extra")


def _batch(labels: list[int], origin: list[int], **fields) -> Batch:
    n = len(labels)
    return Batch(
        ids=torch.arange(n), images=torch.zeros(n, 3, 4, 4), labels=torch.tensor(labels), epoch=0, step=0,
        group_ids=torch.zeros(n, dtype=torch.int64), origin=torch.tensor(origin, dtype=torch.int8), **fields,
    )  # fmt: skip


@pytest.mark.parametrize("form", ["uniform", "other_classes"])
def test_extra_images_have_a_smoothing_of_their_own(form):
    """Gowal et al.'s code: 0.9 * one-hot + 0.1 / K for extra images, one-hot for the others; here with 0.2 for those."""
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels, origin = torch.tensor([0, 3, 3, 1]), torch.tensor([LABELLED, EXTRA, EXTRA, LABELLED])
    section = SmoothedSection(name="x", label_smoothing=0.2, label_smoothing_form=form, extra_label_smoothing=0.1)
    found = cross_entropies(logits, labels, origin, section)
    for row, smoothing in enumerate((0.2, 0.1, 0.1, 0.2)):
        wrong = smoothing / 5 if form == "uniform" else smoothing / 4
        target = torch.full((5,), wrong, dtype=torch.float64)
        target[labels[row]] += 1 - target.sum()
        assert found[row].item() == pytest.approx(-(target * logits[row].log_softmax(0)).sum().item(), rel=1e-12)
    none = SmoothedSection(name="x", extra_label_smoothing=0.1)
    rows = torch.tensor([0, 3])
    torch.testing.assert_close(
        cross_entropies(logits, labels, origin, none)[rows], F.cross_entropy(logits, labels, reduction="none")[rows]
    )


@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_the_loss_is_the_mean_over_the_steps_labelled_images_however_it_is_cut(smoothing):
    section = SmoothedSection(name="x", extra_label_smoothing=smoothing)
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = [1, -1, -1, 2, -1, 0, -1, -1, -1, -1, 4, -1]
    whole = _batch(labels, [EXTRA if y < 0 else LABELLED for y in labels], unlabelled=8, labelled_share=4 / 12)
    expected = F.cross_entropy(logits, whole.labels, ignore_index=-1)
    assert mean_cross_entropy(logits, whole, section).item() == pytest.approx(expected.item(), rel=1e-12)
    for size in (3, 4, 6):
        total = 0.0
        for start in range(0, 12, size):
            rows = slice(start, start + size)
            part = replace(whole, labels=whole.labels[rows], ids=whole.ids[rows], origin=whole.origin[rows])
            total += mean_cross_entropy(logits[rows], part, section) * (size / 12)
        assert float(total) == pytest.approx(expected.item(), rel=1e-12)


def test_a_step_without_a_label_has_no_cross_entropy():
    batch = _batch([-1, -1], [EXTRA, EXTRA], unlabelled=2, labelled_share=0.0)
    logits = torch.randn(2, 5, requires_grad=True)
    loss = mean_cross_entropy(logits, batch, SmoothedSection(name="x"))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


REFUSED = {
    "no share": ("data.extra={files: [a.npz]}", "labelled_ratio"),
    "no file": ("data.extra={files: [], labelled_ratio: 0.3}", "files"),
    "a share past one": ("data.extra={files: [a.npz], labelled_ratio: 1.5}", "0 to 1, got 1.5"),
    "phases that do not begin": ("data.extra={files: [a.npz], labelled_ratio: [[1, 0.5]]}", "begin with 0 and rise"),
    "phases that do not rise": ("data.extra={files: [a.npz], labelled_ratio: [[0, 1], [2, 0], [2, 1]]}", "and rise"),
    "a phase past the end": ("data.extra={files: [a.npz], labelled_ratio: [[0, 1], [9999, 0]]}", "at or past the last"),
    "copies that do not divide": ("data.labelled_copies=7", "not a multiple of data.labelled_copies 7"),
    "smoothing of no extra images": ("objective.extra_label_smoothing=0.1", "has no data.extra"),
    "a misspelt field": ("data.extra={file: [a.npz], labelled_ratio: 0.3}", "files"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_recipe_cannot_ask_for_is_refused(name):
    word, reason = REFUSED[name]
    with pytest.raises(ConfigError, match=reason):
        load_recipe("digits/adversarial.yaml", [word])


def test_folders_take_no_extra_images():
    with pytest.raises(
        ValueError, match="extra goes with data sets whose images are of one size; 'folder' is a folder"
    ):
        DataConfig(dataset="folder", image_size=8, extra={"files": ("a.npz",), "labelled_ratio": 0.3})
