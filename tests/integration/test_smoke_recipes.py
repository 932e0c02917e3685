"""Every strategy of the ImageNet recipes trains: a few real steps each on a small folder of images."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from distributed_at.objectives.mixture import kept_count
from distributed_at.recipes import load_recipe, recipe_root, rows_of
from tests.integration.training import same_bits, tensors, train

TABLE = "imagenet/smoke_strategies.yaml"
ROWS = rows_of(recipe_root() / TABLE)
STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of smooth noise, 16 training and 4 test images each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, number in (("train", 16), ("val", 4)):
        for label, name in enumerate(("n01", "n02", "n03")):
            (root / split / name).mkdir(parents=True)
            for k in range(number):
                small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
                small[..., label] //= 3
                size = (48 + 4 * (k % 3), 40 + 8 * (k % 2))
                Image.fromarray(small).resize(size).save(root / split / name / f"{name}_{k}.JPEG", quality=90)
    return root


def _load(row, folder, *overrides):
    return _recipe(f"{TABLE}#{row}", folder, *overrides)


def _recipe(ref, folder, *overrides):
    return load_recipe(
        ref,
        [
            f"data.path={folder}",
            "data.backend=pil",
            "data.limit_train=32",
            "data.num_threads=1",
            "log.every_steps=1",
            "checkpoint={every_steps: 1, every_epochs: null, keep: 3, asynchronous: false}",
            *overrides,
        ],
    ).config


@pytest.mark.parametrize("row", ROWS)
def test_strategy_trains_on_real_files(row, folder, tmp_path):
    config = _load(row, folder)
    run = train(config, tmp_path / "run")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    rows = [e for e in events if e["event"] == "train"]
    assert [e["step"] for e in rows] == [1, 2]
    assert all(math.isfinite(e["loss"]) for e in rows)
    assert events[-1]["event"] == "run_end"
    assert events[-1]["reason"] == "finished"
    _terms_are_those_of_the_strategy(config, rows[-1])
    first, last = tensors(run, 1), tensors(run, 2)
    kernels = [n for n in first if n.startswith("model.") and n.endswith("conv1.weight")]
    assert kernels
    assert not any(same_bits(first[n], last[n]) for n in kernels)
    _statistics_are_those_of_the_strategy(config, first, last)


def test_smoke_recipe_trains_as_it_is_written(folder, tmp_path):
    """The whole recipe of the paper on a narrow ResNet-50: PGD-30, colour jitter, groups of batch norm."""
    config = _recipe("imagenet/smoke.yaml", folder)
    assert (config.attack.num_steps, config.data.image_size, sum(config.model.blocks)) == (30, 64, 16)
    assert config.data.augment.colour_jitter
    run = train(config, tmp_path / "run")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "train"] == [1, 2]
    assert all(math.isfinite(e["adv_loss"]) for e in events if e["event"] == "train")
    assert events[-1]["reason"] == "finished"


def _terms_are_those_of_the_strategy(config, event):
    terms = {"clean_loss", "adv_loss", "logit_pairing"} & set(event)
    expected = {"clean_loss"} if config.objective.name == "standard" else {"adv_loss"}
    if config.objective.name == "mixture":
        group = config.train.bn_group_size
        expected |= {"clean_loss"} if kept_count(group, config.objective.clean_ratio) else set()
        expected |= {"logit_pairing"} if config.objective.logit_pairing else set()
    assert terms == expected


def _statistics_are_those_of_the_strategy(config, first, last):
    names = [n for n in first if n.endswith(("running_mean", "running_var"))]
    branches = {n.rsplit(".", 2)[1] for n in names}
    if config.model.norm == "gn":
        assert names == []
    elif config.model.norm == "mbn":
        assert branches == {"clean", "adv"}
    frozen = config.train.freeze_bn_from_epoch is not None  # from epoch 0.5 on: the second of two steps
    assert all(same_bits(first[n], last[n]) == frozen for n in names)


def test_rows_cover_every_strategy_with_every_norm():
    covered = set()
    for row in ROWS:
        config = load_recipe(f"{TABLE}#{row}").config
        objective = config.objective
        strategy = "alp" if getattr(objective, "logit_pairing", 0) else objective.name
        covered.add((strategy, config.model.norm))
        if strategy == "mixture" and config.model.norm == "bn":
            covered.add(("clean", round(100 * objective.clean_ratio)))
    assert {(s, n) for s in ("mixture", "alp") for n in ("bn", "mbn", "gn")} <= covered
    assert {("clean", r) for r in (0, 20, 40, 60, 80, 100)} <= covered
    assert {("pgd_at", "bn"), ("pgd_at", "gn"), ("standard", "bn")} <= covered


def test_mixture_with_no_clean_images_trains_like_adversarial_images_alone(folder, tmp_path):
    """The paper's "100% adv + 0% clean" is one thing, whichever objective names it."""
    alone = train(_load("adv-only", folder), tmp_path / "alone")
    mixture = train(_load("bn-clean0", folder), tmp_path / "mixture")
    expected, got = tensors(alone, STEPS), tensors(mixture, STEPS)
    assert [n for n in expected if not torch.equal(expected[n], got[n])] == []
