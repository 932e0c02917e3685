"""Networks of torchvision, timm and a user's file train adversarially, resume bitwise and are evaluated like ours."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from distributed_at.catalogue.networks import NETWORKS
from distributed_at.cli import main
from distributed_at.engine.runs.evaluate_run import evaluate_run
from distributed_at.engine.runs.initial_weights import check_initial_weights
from distributed_at.errors import ConfigError
from distributed_at.recipes import load_recipe
from tests.integration.training import TINY, built, cut_back, same_bits, tensors, train

WORDS = [word for word in TINY if not word.startswith(("model=", "objective="))]
FILE = """
from torch import nn

def build(num_classes, image_size, width=8):
    assert image_size == 8
    body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2), nn.Flatten())
    return nn.Sequential(body, nn.Linear(width * 36, num_classes))

def wrong(num_classes):
    return 1 / 0
"""
needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an extra")
NETS = {
    "torchvision, mixture": ["model={arch: 'torchvision:resnet18', norm: mbn}", "objective={name: mixture}"],
    "timm, stochastic depth": [
        "model={arch: 'timm:vit_tiny_patch16_224', options: {patch_size: 4, depth: 3, drop_path_rate: 0.3}}",
        "objective={name: trades}",
        "attack.target=none",
        "optimizer={name: adam, lr: 0.001}",
    ],
    "wide, dropout": [
        "model={arch: wide_resnet, depth: 10, widen: 1, dropout: 0.3}",
        "objective={name: mixture, clean_ratio: 0.5}",
        "train.bn_group_size=8",
        "train.ema={decay: 0.9}",
    ],
}


def config_of(name: str, *more: str):
    return load_recipe("digits/adversarial.yaml", [*WORDS, *NETS[name], *more]).config


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_timm if "timm" in n else ()) for n in NETS])
def test_network_trains_resumes_bitwise_and_is_evaluated(name: str, tmp_path: Path) -> None:
    config = config_of(name, "train.epochs=1")
    whole = train(config, tmp_path / "whole")
    again = train(config, cut_back(whole, tmp_path / "again", 4))
    last, other = tensors(whole, 8), tensors(again, 8)
    assert last.keys() == other.keys()
    assert all(same_bits(last[key], other[key]) for key in last)
    assert evaluate_run(whole).results[0].total == 16


def test_masks_of_a_run_are_those_of_its_samples_and_not_of_its_seed_alone(tmp_path: Path) -> None:
    """The same run without dropout, and with another probability, end elsewhere: the masks are really on."""
    ends = [
        tensors(train(config_of("wide, dropout", f"model.dropout={p}", "train.epochs=0.5"), tmp_path / str(p)), 4)
        for p in (0.0, 0.3, 0.5)
    ]
    weights = [end["model.fc.weight"] for end in ends]
    assert not any(torch.equal(a, b) for a, b in ((weights[0], weights[1]), (weights[1], weights[2])))


@pytest.fixture
def here(tmp_path: Path):
    (tmp_path / "net.py").write_text(FILE)
    (tmp_path / "mine.yaml").write_text(
        "extends: digits/adversarial.yaml\nname: mine\nmodel: {arch: 'net.py:build', options: {width: 4}}\n"
    )
    yield tmp_path
    for name in [n for n in NETWORKS if str(tmp_path) in n]:
        NETWORKS.remove(name)


def test_network_of_a_file_beside_the_recipe_is_part_of_the_run(here: Path) -> None:
    config = load_recipe(str(here / "mine.yaml"), WORDS).config
    assert config.model.arch == f"{here / 'net.py'}:build"
    (plugin,) = config.plugins
    assert plugin.path == str(here / "net.py")
    whole = train(config, here / "whole")
    again = train(config, cut_back(whole, here / "again", 8))
    assert all(same_bits(t, tensors(again, 16)[name]) for name, t in tensors(whole, 16).items())
    (here / "net.py").unlink()
    NETWORKS.remove(config.model.arch)
    words = [sys.executable, "-m", "distributed_at", "eval", str(whole), "--workers", "1", "--json"]
    done = subprocess.run(words, capture_output=True, text=True)  # a process that has never seen the file
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["total"] == 16


@pytest.mark.slow  # that masks are those of the samples whatever the batch is tested in unit/test_foreign_networks.py
def test_two_workers_train_a_file_s_network_with_dropout_as_one_does(here: Path) -> None:
    """Masks belong to samples: on two ranks the same images are dropped, up to the order of sums."""
    words = [*WORDS, "train.epochs=0.5", "train.bn_group_size=4"]
    for workers in (1, 2):
        line = [sys.executable, "-m", "distributed_at", "train", str(here / "mine.yaml"), *words]
        line += ["--workers", str(workers), "--run-folder", str(here / f"w{workers}"), "--quiet"]
        done = subprocess.run(line, capture_output=True, text=True, cwd=here)
        assert done.returncode == 0, done.stderr
    one, two = (tensors(here / f"w{workers}", 4) for workers in (1, 2))
    assert all(torch.allclose(one[name].float(), two[name].float(), atol=1e-5) for name in one if "model." in name)


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ("net.py:biuld", r"has no function 'biuld'\. Did you mean 'build'\?"),
        ("nett.py:build", r"there is no file .*nett\.py"),
        ("net.py:wrong", r"net\.py:\d+: ZeroDivisionError"),
        ("torchvison:resnet18", r"Allowed: .*torchvision:NAME"),
        ("torchvision:resnet1", r"Did you mean 'resnet18'\?"),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(here: Path, arch: str, told: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(here)
    assert main(["plan", "digits/adversarial.yaml", f"model={{arch: '{arch}'}}"]) == 2
    err = capsys.readouterr().err
    assert re.search(told, err), err
    assert "Traceback" not in err


def test_run_begins_from_pretrained_weights_and_says_what_the_head_did_not_take(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = torchvision.models.resnet18(num_classes=1000).state_dict()
    torch.save(state, tmp_path / "published.pt")
    words = [*NETS["torchvision, mixture"], f"model.pretrained={tmp_path / 'published.pt'}"]
    config = load_recipe("digits/adversarial.yaml", [*WORDS, *words]).config
    parts = built(config, None)
    assert parts.initial_weights is None  # without a folder nothing is read
    folder = train(
        config.model_copy(update={"train": config.train.model_copy(update={"epochs": 0.5})}), tmp_path / "run"
    )
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (begun,) = [row["initial_weights"] for row in rows if row["event"] == "run_start"]
    assert begun["dropped"] == ["network.fc.weight", "network.fc.bias"]
    assert begun["source"] == str(tmp_path / "published.pt")
    twice = load_recipe("digits/adversarial.yaml", [*WORDS, *words, "train.init_from=x"]).config
    with pytest.raises(ConfigError, match="two beginnings"):
        check_initial_weights(twice)
