"""A user's file that a recipe names: one file, and it trains, resumes, plans, evaluates and is told of when it changed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_at.catalogue.networks import NETWORKS
from distributed_at.catalogue.optimizers import OPTIMIZERS
from distributed_at.catalogue.schedules import SCHEDULES
from distributed_at.cli import main
from distributed_at.config import RunConfig
from distributed_at.engine.checkpoint.files import read_manifest
from distributed_at.engine.runs.evaluate_run import evaluate_run
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.engine.runs.weights import open_network
from distributed_at.errors import ConfigError
from distributed_at.objectives import OBJECTIVES
from distributed_at.planning import make_plan
from distributed_at.recipes import load_recipe
from tests.integration.training import TINY, built, cut_back, same_bits, tensors, train

MART = Path(__file__).parents[1] / "plugins" / "mart.py"
SMALL = [text for text in TINY if not text.startswith("objective=")]


@pytest.fixture
def here(tmp_path: Path):
    """A folder with a recipe and the plug-in that it names; what it registered is forgotten afterwards."""
    shutil.copy(MART, tmp_path / "mart.py")
    (tmp_path / "mine.yaml").write_text(
        "extends: digits/adversarial.yaml\nname: mine\nplugins: [mart.py]\nobjective: {name: own_mart, beta: 4}\n"
    )
    before = set(OBJECTIVES)
    yield tmp_path
    for name in set(OBJECTIVES) - before:
        OBJECTIVES.remove(name)


def recipe(folder: Path, *overrides: str) -> RunConfig:
    return load_recipe(str(folder / "mine.yaml"), [*SMALL, *overrides]).config


def test_recipe_names_a_file_beside_it_and_the_run_knows_its_content(here: Path) -> None:
    config = recipe(here, "objective.beta=3")
    assert config.objective.model_dump() == {"name": "own_mart", "beta": 3.0}
    (plugin,) = config.plugins
    assert Path(plugin.path) == here / "mart.py"
    assert make_plan(config).train_units == 6  # two trained passes, as the file says
    assert make_plan(config).plugins == ((plugin.path, plugin.sha256),)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


def test_plugin_trains_resumes_bitwise_and_is_evaluated_with_the_code_that_it_was_trained_with(here: Path) -> None:
    config = recipe(here)
    whole = train(config, here / "whole")
    resumed = train(config, cut_back(whole, here / "again", 8))
    last, other = tensors(whole, 16), tensors(resumed, 16)
    assert last.keys() == other.keys()
    assert all(same_bits(last[name], other[name]) for name in last)
    measured = evaluate_run(whole).results[0]
    assert json.loads(measured.protocol.model)["plugins"] == [config.plugins[0].sha256]
    (here / "mart.py").write_text("raise SystemExit('not the code of that run')\n")
    again = evaluate_run(whole).results[0]
    assert again.protocol.hash == measured.protocol.hash
    (here / "mart.py").unlink()
    assert evaluate_run(whole).results[0].protocol.hash == measured.protocol.hash


def test_changed_file_is_told_like_a_changed_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(recipe(here), here / "run")
    before = recipe(here).plugins[0].sha256
    (here / "mart.py").write_text((here / "mart.py").read_text() + "\n# another thought\n")
    with pytest.raises(ConfigError, match=rf"another recipe; it differs in\n.*plugins.*sha256.*{before}"):
        train(recipe(here), folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import nothing_of_this_name\n", r"mart.py:1: ModuleNotFoundError"),
        ("x = 1\ny = x +\n", r"mart.py:2: SyntaxError"),
        ("def f():\n    return 1 / 0\nf()\n", r"mart.py:2: ZeroDivisionError"),
        ("x = 1\n", r"says what it adds in a dict named OBJECTIVES"),
        ("OBJECTIVS = {'a': 1}\n", r"OBJECTIVS is no registry. Did you mean 'OBJECTIVES'"),
        ("OBJECTIVES = ['a']\n", r"OBJECTIVES must be a dict of names"),
        ("OBJECTIVES = {'trades': 1}\n", r"objective 'trades' exists already"),
    ],
)
def test_mistake_in_a_plugin_is_told_by_its_line_without_our_stack(
    here: Path, text: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "mart.py").write_text(text)
    with pytest.raises(ConfigError, match=rf"mine.yaml:3: .*{told}"):
        recipe(here)
    assert main(["plan", str(here / "mine.yaml")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_absent_file_is_told_with_the_line_that_names_it(here: Path) -> None:
    (here / "mart.py").unlink()
    with pytest.raises(ConfigError, match=r"mine.yaml:3: there is no file .*mart.py"):
        recipe(here)


def test_names_of_a_plugin_are_suggested_like_ours(here: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective.name: 'own_marl'.*Did you mean 'own_mart'"):
        recipe(here, "objective.name=own_marl")
    with pytest.raises(ConfigError, match=r"unknown key 'bta'.*Did you mean 'objective.beta'"):
        recipe(here, "objective.bta=2")


def test_command_line_trains_with_a_plugin_given_there(here: Path) -> None:
    """In a process of its own, as a user's shell would; two workers are tests/distributed's business."""
    words = ["plan", "digits/adversarial.yaml", f"plugins=[{here / 'mart.py'}]", "objective={name: own_mart}", "--json"]
    done = subprocess.run([sys.executable, "-m", "distributed_at", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train_units"] == 6


def test_example_of_the_docs_trains_as_it_is_printed(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    recipe_text, code = (re.search(rf"```{kind}\n(.*?)```", text, re.S)[1] for kind in ("yaml", "python"))
    assert len(code.splitlines()) <= 40
    (tmp_path / "mine.yaml").write_text(recipe_text)
    (tmp_path / "my_method.py").write_text(code)
    try:
        words = [word for word in SMALL if not word.startswith("model=")]
        config = load_recipe(str(tmp_path / "mine.yaml"), words).config
        assert config.objective.model_dump() == {"name": "mine", "weight": 2.0}
        found = make_plan(config)
        assert (found.train_units, found.statistics.parameters) == (6, 3 * 8 * 9 + 8 + 16 + 8 * 10 + 10)
        whole = train(config, tmp_path / "whole")
        again = train(config, cut_back(whole, tmp_path / "again", 8))
        assert all(same_bits(t, tensors(again, 16)[name]) for name, t in tensors(whole, 16).items())
        assert evaluate_run(whole).results[0].total == 16
        assert main(["report", str(whole)]) == 0
    finally:
        OBJECTIVES.remove("mine")
        NETWORKS.remove("small")


@pytest.fixture
def training_plugin():
    yield Path(__file__).parents[1] / "plugins" / "training.py"
    for registry, name in ((OPTIMIZERS, "radam"), (SCHEDULES, "line")):
        if name in registry:
            registry.remove(name)


def test_a_plugins_optimiser_and_schedule_train_and_resume_bitwise(training_plugin: Path, tmp_path: Path) -> None:
    words = [word for word in TINY if not word.startswith(("optimizer=", "schedule="))]
    words += [
        "optimizer={name: radam, lr: 0.01, nesterov: false, options: {betas: [0.8, 0.9]}}",
        f"plugins=[{training_plugin}]",
    ]
    words += ["schedule={name: line, warmup_epochs: 0, options: {end: 0.2}}", "log.every_steps=1"]
    config = load_recipe("digits/adversarial.yaml", words).config
    whole = train(config, tmp_path / "whole")
    again = train(config, cut_back(whole, tmp_path / "again", 8))
    assert all(same_bits(t, tensors(again, 16)[name]) for name, t in tensors(whole, 16).items())
    rows = [json.loads(row) for row in (whole / "events.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["event"] == "train"]
    assert rates == pytest.approx([0.01 * (1 - 0.8 * step / 16) for step in range(16)])
    group = built(config).engine.optimizer.param_groups[0]
    assert tuple(group["betas"]) == (0.8, 0.9)
    with pytest.raises(ConfigError, match="options belong to a plug-in's optimiser; 'sgd' has fields of its own"):
        load_recipe("digits/adversarial.yaml", [*TINY, "optimizer.options={betas: [0.8, 0.9]}"])
    with pytest.raises(ConfigError, match=r"nesterov needs optimizer\.name: sgd"):
        load_recipe("digits/adversarial.yaml", [*words, "optimizer.nesterov=true"])


def test_run_that_begins_from_another_has_its_plugins(tmp_path: Path) -> None:
    """Its network and data may be theirs: ``init=RUN`` takes both over."""
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\n\ndef tiny(num_classes, width=8):\n"
        "    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(width, num_classes))\n\n\nNETWORKS = {'mine': tiny}\n"
    )
    words = [word for word in TINY if not word.startswith("model=")]
    try:
        mine = ["model={arch: mine, options: {width: 12}}", f"plugins=[{tmp_path / 'net.py'}]"]
        first = train(load_recipe("digits/adversarial.yaml", [*words, *mine]).config, tmp_path / "first")
        NETWORKS.remove("mine")
        config = load_recipe("digits/adversarial.yaml", [*words, f"init={first}", "seed=3"]).config
        assert (config.model.arch, config.model.options) == ("mine", {"width": 12})
        assert [Path(plugin.path).name for plugin in config.plugins] == ["net.py"]
        begun = built(config, RunFolder(tmp_path / "none")).engine.module.state_dict()
        saved = open_network(RunFolder(first), config, "last").network.state_dict()
        assert all(same_bits(tensor, saved[name]) for name, tensor in begun.items())
        second = train(config, tmp_path / "second")
        said = read_manifest(second / "checkpoints" / "step_00000016").metadata
        assert [plugin["sha256"] for plugin in said["plugins"]] == [config.plugins[0].sha256]
        assert (said["model"]["arch"], said["num_classes"], said["image_size"]) == ("mine", 10, 8)
        assert evaluate_run(second).results[0].total == 16
    finally:
        if "mine" in NETWORKS:
            NETWORKS.remove("mine")
