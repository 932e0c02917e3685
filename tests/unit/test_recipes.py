"""Recipes: references, extends, rows, overrides, and the promise that every one in the repository is sound."""

import shutil

import pytest
import torch

from distributed_at import recipes
from distributed_at.config import RunConfig
from distributed_at.engine.batching import BatchPlan, valid_world_sizes
from distributed_at.errors import ConfigError
from distributed_at.models import build_model
from distributed_at.recipe_nodes import dump, parse_text
from distributed_at.recipes import (
    diff,
    dump_yaml,
    group_by_table,
    list_recipes,
    load_recipe,
    recipe_files,
    recipe_hash,
    recipe_root,
)

ENTRIES = list_recipes()
REFS = [entry.ref for entry in ENTRIES]

MINIMAL = """\
name: tiny
data: {dataset: digits, image_size: 8}
model: {arch: preact_resnet, blocks: [1], block: basic, base_width: 8, stem: cifar}
attack: {eps: 51, num_steps: 2, step_size: 25.5}
objective: {name: pgd_at, label_smoothing: 0.1, bn_clean_updates_per_step: 1}
optimizer: {lr: 0.1}
train: {epochs: 1, batch_size: 32}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(MINIMAL)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


@pytest.mark.parametrize("ref", REFS)
def test_every_recipe_round_trips(ref, tmp_path):
    config = load_recipe(ref).config
    (tmp_path / "recipe.yaml").write_text(dump_yaml(config))
    again = load_recipe(str(tmp_path)).config
    assert again == config
    assert recipe_hash(again) == recipe_hash(config)


@pytest.mark.parametrize("ref", REFS)
def test_every_recipe_runs_on_one_worker_and_at_full_scale(ref):
    train = load_recipe(ref).config.train
    sizes = {"micro_batch_size": train.micro_batch_size, "bn_group_size": train.bn_group_size}
    worlds = valid_world_sizes(train.batch_size, **sizes)
    assert worlds[0] == 1
    full = max(world for world in worlds if world <= max(1, train.batch_size // 32))
    plan = BatchPlan.resolve(batch_size=train.batch_size, world_size=full, **sizes)
    assert plan.world_size * plan.micro_batch * plan.accumulation == train.batch_size


def test_imagenet_base_is_128_by_32():
    train = load_recipe("imagenet/xie_yuille/base").config.train
    plan = BatchPlan.resolve(
        batch_size=train.batch_size,
        world_size=128,
        micro_batch_size=train.micro_batch_size,
        bn_group_size=train.bn_group_size,
    )
    assert (plan.micro_batch, plan.group_size, plan.accumulation) == (32, 32, 1)


def _models():
    seen = {}
    for ref in REFS:
        config = load_recipe(ref).config
        seen.setdefault((config.model, config.data.dataset), ref)
    return sorted(seen.values())


@pytest.mark.parametrize("ref", _models())
def test_every_recipes_model_builds_on_the_meta_device(ref):
    config = load_recipe(ref).config
    with torch.device("meta"):
        model = build_model(config.model, num_classes=1000 if config.data.dataset == "imagenet" else 10)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_every_run_name_is_its_own():
    names = [load_recipe(ref).config.name for ref in REFS if "xie" not in ref]
    assert len(set(names)) == len(names)


def test_every_recipe_file_begins_with_a_comment():
    for path in recipe_root().glob("[cdi]*/**/*.yaml"):
        assert path.read_text().startswith("# "), path


def test_every_table_row_carries_the_papers_label():
    ours = ("imagenet/smoke_strategies.yaml", "imagenet/two_domains.yaml")  # tables of runs that no paper made
    for entry in ENTRIES:
        if "#" in entry.ref and not entry.ref.startswith(ours):
            assert entry.paper is not None, entry.ref
            assert entry.paper.row, entry.ref


def test_table_7_is_complete():
    rows = [entry for entry in ENTRIES if entry.ref.startswith("imagenet/xie_yuille/table7.yaml#")]
    assert len(rows) == 13 + 3 * 8 + 4 + 4
    assert all(len(entry.paper.numbers) == 6 for entry in rows)
    numbers = {entry.ref.split("#")[1]: entry.paper.numbers["pgd2000"] for entry in rows}
    assert (numbers["n30-clean0"], numbers["n30-gn"], numbers["n5-mbn-alp-star"], numbers["resnet638"]) == (
        39.2,
        39.0,
        35.4,
        46.7,
    )


def test_deeper_rows_change_what_the_table_says_and_nothing_else():
    rows = {
        n: load_recipe(f"imagenet/xie_yuille/table7.yaml#{n}").config
        for n in ("n30-clean0", "n30-mbn-alp-star", "n5-mbn")
    }
    changed = {line.split(":")[0] for line in diff(rows["n30-clean0"], rows["n30-mbn-alp-star"])}
    assert {"model.norm", "objective.name", "objective.logit_pairing", "train.freeze_bn_from_epoch"} <= changed
    assert not any(key.startswith(("optimizer", "schedule", "data")) for key in changed)
    assert rows["n5-mbn"].attack.num_steps == 5
    assert rows["n5-mbn"].attack.step_size == 4
    assert rows["n5-mbn"].attack.start_clean_probability == 0.2


def test_bag_of_tricks_follows_the_code():
    config = load_recipe("cifar/bag_of_tricks/base").config
    assert config.objective.bn_clean_updates_per_step == 2
    assert config.objective.label_smoothing_form == "other_classes"
    assert (config.schedule.milestones, config.schedule.boundary) == ((100.0, 105.0), "last_iteration")
    assert (config.data.augment.pad_mode, config.train.drop_last) == ("reflect", False)
    assert load_recipe("cifar/bag_of_tricks/baselines.yaml#wrn34-10-eval").config.attack.bn_mode == "eval"


def test_trades_rows_at_0_031_train_and_evaluate_at_it():
    config = load_recipe("cifar/bag_of_tricks/table9.yaml#eps0.031-wrn34-10-wd5e-4-eval").config
    assert (config.attack.eps, config.attack.step_size, config.attack.start, config.attack.clip_start) == (
        7.905,
        1.785,
        "gaussian",
        False,
    )
    assert config.evaluation.final[1].attack.eps == 7.905
    assert config.optimizer.weight_decay == 5e-4


def test_entries_group_by_paper_and_table():
    groups = group_by_table(ENTRIES)
    assert len(groups[("Bag of Tricks for Adversarial Training", "Table 8")]) == 18
    assert len(groups[("Bag of Tricks for Adversarial Training", "Table 9")]) == 17
    assert {entry.ref for entry in groups[("", "")]} >= {"digits/adversarial.yaml", "digits/natural.yaml"}


def test_reference_needs_no_suffix_and_no_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("digits/adversarial").config == load_recipe("digits/adversarial.yaml").config
    assert recipe_files()


def test_extends_merges_sections_and_replaces_lists(folder):
    folder("child.yaml", "extends: tiny.yaml\nname: child\nmodel: {blocks: [1, 1]}\noptimizer.weight_decay: 1e-4\n")
    config = load_recipe("child.yaml").config
    assert (config.model.blocks, config.model.base_width) == ((1, 1), 8)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.1, 1e-4)


def test_extends_is_relative_to_the_file_and_later_parts_win(folder):
    folder("deep/a.yaml", "extends: [../tiny.yaml, _b.yaml]\nname: a\n")
    folder("deep/_b.yaml", "optimizer: {lr: 0.3}\n")
    assert load_recipe("deep/a").config.optimizer.lr == 0.3


def test_extends_cycle_is_named(folder):
    folder("a.yaml", "extends: b.yaml\n")
    folder("b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml:1: extends goes round in a circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load_recipe("a.yaml")


def test_rows_can_extend_rows_and_keep_their_own_paper_entry(folder):
    folder(
        "t.yaml",
        "base: tiny.yaml\npaper: {title: P, table: T}\nrows:\n"
        "  one: {optimizer.lr: 0.2, paper: {row: first, clean: 80.5}}\n"
        '  two: {extends: "#one", train.epochs: 2, paper: {row: second, aa: 40}}\n',
    )
    two = load_recipe("t.yaml#two").config
    assert (two.name, two.optimizer.lr, two.train.epochs) == ("t-two", 0.2, 2)
    assert (two.paper.title, two.paper.row, two.paper.numbers) == ("P", "second", {"aa": 40.0})


def test_overrides_are_yaml_and_win(folder):
    config = load_recipe(
        "tiny",
        [
            "optimizer.lr=5e-2",
            "model.blocks=[1, 1]",
            "train.bn_group_size=null",
            "attack.eps=8/255",
            "attack.step_size=2",
        ],
    ).config
    assert (config.optimizer.lr, config.model.blocks, config.attack.eps) == (0.05, (1, 1), 8.0)


def test_override_reaches_into_lists(folder):
    folder("e.yaml", "extends: tiny\nname: e\nevaluation: {final: [{kind: clean}, {kind: clean, name: x}]}\n")
    config = load_recipe("e", ["evaluation.final.1.batch_size=7"]).config
    assert [protocol.batch_size for protocol in config.evaluation.final] == [256, 7]


def test_override_null_removes_a_section(folder):
    config = load_recipe("tiny", ["attack=null", "objective.name=standard"]).config
    assert config.attack is None


def test_another_objective_keeps_shared_fields_and_drops_the_rest(folder):
    config = load_recipe("tiny", ["objective.beta=3", "objective.name=trades"]).config
    assert (config.objective.name, config.objective.beta, config.objective.label_smoothing) == ("trades", 3.0, 0.1)


def test_yaml_words_on_and_off_stay_words(folder):
    config = load_recipe("tiny", ["attack.compile=off", "log.wandb=off"]).config
    assert config.attack.compile == "off"
    folder("again.yaml", dump_yaml(config))
    assert load_recipe("again").config == config


@pytest.mark.parametrize("text", ["1e-4", "off", "null", "12", "~", "yes", "2020-01-01", "", "a: b", "1:30", "- x"])
def test_dump_quotes_whatever_yaml_would_misread(text):
    assert parse_text(dump({"key": text, "list": [text]}), "x").plain() == {"key": text, "list": [text]}


def test_diff_names_fields_and_both_values(folder):
    before = load_recipe("tiny").config
    after = load_recipe("tiny", ["optimizer.lr=0.2", "model.blocks=[1, 2]"]).config
    assert diff(before, before) == []
    assert diff(before, after) == ["model.blocks.1: (absent) -> 2", "optimizer.lr: 0.1 -> 0.2"]
    assert recipe_hash(before) != recipe_hash(after)


def test_resolved_recipe_names_its_files(folder):
    folder("child.yaml", "extends: tiny.yaml\n")
    resolved = load_recipe("child.yaml", ["seed=3"])
    assert [path.name for path in resolved.files] == ["child.yaml", "tiny.yaml"]
    assert resolved.overrides == ("seed=3",)
    assert isinstance(resolved.config, RunConfig)


def test_recipes_are_found_without_a_checkout(tmp_path, monkeypatch):
    """An installed package carries its recipes inside; a folder without pyproject.toml is no checkout."""
    module = tmp_path / "site" / "distributed_at" / "recipes.py"
    shipped = module.parent / "_recipes"
    shutil.copytree(recipe_root() / "digits", shipped / "digits")
    monkeypatch.setattr(recipes, "__file__", str(module))
    monkeypatch.chdir(tmp_path)
    assert recipe_root() == shipped
    assert load_recipe("digits/adversarial").files == (shipped / "digits" / "adversarial.yaml",)
