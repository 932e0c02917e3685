"""Whole trainings with extra images: stopped and resumed, changed files, images without labels, copies."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from distributed_at.cli import main
from distributed_at.data.training import open_training
from distributed_at.data.uses import FIRST_EXTRA
from distributed_at.errors import EXIT_OK, EXIT_REQUEUE, ConfigError
from distributed_at.recipes import load_recipe
from tests.training_kit import RECIPE, TINY, recorded, state_digest, train, training_rows


def write_extra(path, *, label=None, seed=0):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 10, 40) if label is None else np.full(40, label)
    np.savez(path, image=draw.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), label=labels)
    return f"data.extra={{files: ['{path}'], labelled_ratio: [[0, 0.5], [1.5, 0.25]]}}"


MIX = ("data.labelled_copies=2", "data.augment={crop: pad, pad: 1, flip: true}", "attack.target=none")


def test_a_run_with_extra_images_resumes_bitwise_and_draws_anew_for_each_use(tmp_path):
    torch.set_num_threads(1)
    words = [write_extra(tmp_path / "extra.npz"), *MIX, "objective.extra_label_smoothing=0.1"]
    with recorded() as whole:
        assert train(tmp_path / "whole", words) == EXIT_OK
    with recorded() as parts:
        assert train(tmp_path / "parts", words, stop_at=4) == EXIT_REQUEUE
        assert train(tmp_path / "parts", words) == EXIT_OK
    assert sorted(parts) == sorted(whole)
    assert training_rows(tmp_path / "parts") == training_rows(tmp_path / "whole")
    assert state_digest(tmp_path / "parts") == state_digest(tmp_path / "whole")
    assert len({(epoch, sample) for epoch, sample, *_ in whole}) == len(whole) == 9 * 24
    span = open_training(load_recipe(str(RECIPE), [*TINY, *words]).config)[1].numbers.span
    of_image = defaultdict(set)  # (epoch, image) -> starts
    for epoch, sample, _, start, _ in whole:
        image = sample if sample >= FIRST_EXTRA else sample % span
        of_image[epoch, image].add(start)
    assert sum(len(starts) > 1 for starts in of_image.values()) > 20
    extra = sum(sample >= FIRST_EXTRA for _, sample, *_ in whole)
    assert extra == 5 * 12 + 4 * 18  # epoch 1.5 is step 4.5 of 3 an epoch: five steps of a half, four of three quarters


def test_other_extra_images_are_noticed_at_a_resume(tmp_path):
    words = [write_extra(tmp_path / "extra.npz"), *MIX]
    assert train(tmp_path / "run", words, stop_at=2) == EXIT_REQUEUE
    write_extra(tmp_path / "extra.npz", seed=1)
    with pytest.raises(ConfigError, match="data of split 'extra' are not those that this run began with"):
        train(tmp_path / "run", words)


def test_images_without_labels_train_trades_alone_and_count_in_its_divergence(tmp_path):
    torch.set_num_threads(1)
    bare = [write_extra(tmp_path / "bare.npz", label=-1), *MIX]
    trades = [*bare, "objective={name: trades, beta: 6}", "attack.loss=kl"]
    with pytest.raises(ConfigError, match="have no labels, and objective 'pgd_at' trains on the label of every image"):
        train(tmp_path / "refused", bare)
    with pytest.raises(ConfigError, match=r"have no labels, and attack.loss 'ce' climbs the loss of the label"):
        train(tmp_path / "refused_too", [*bare, "objective={name: trades, beta: 6}", "attack.loss=ce"])
    assert train(tmp_path / "one", trades) == EXIT_OK
    rows = [row for row in training_rows(tmp_path / "one") if row["event"] == "train"]
    assert all(0 <= row["clean_accuracy"] <= 1 and np.isfinite(row["clean_loss"]) for row in rows)
    assert train(tmp_path / "cut", [*trades, "train.micro_batch_size=6"]) == EXIT_OK
    cut = [row for row in training_rows(tmp_path / "cut") if row["event"] == "train"]
    for name in ("loss", "clean_loss", "kl", "clean_accuracy"):  # of the first step: later ones magnify rounding
        assert cut[0][name] == pytest.approx(rows[0][name], rel=1e-4)


def test_plan_says_what_a_batch_holds(tmp_path, capsys):
    words = [write_extra(tmp_path / "extra.npz"), *MIX, "train.batch_size=48", "train.bn_group_size=6"]
    assert main(["plan", "digits/adversarial.yaml", *words]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "from epoch 0 a batch holds 24 labelled images (12 different ones, each 2 times) and 24 extra ones" in out
    assert "from epoch 1.5 a batch holds 12 labelled images (6 different ones, each 2 times) and 36 extra ones" in out
