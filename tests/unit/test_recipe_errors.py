"""Mistakes in recipes: each message names file and line (or override), field, value, what is allowed, the nearest."""

import pytest

from distributed_at.errors import EXIT_CONFIG, ConfigError
from distributed_at.objectives import OBJECTIVES
from distributed_at.recipes import load_recipe

RECIPE = """\
name: tiny
data:
  dataset: digits
  image_size: 8
model:
  arch: preact_resnet
  blocks: [1]
  block: basic
  base_width: 8
attack:
  eps: 51
  num_steps: 2
  step_size: 25.5
objective: {name: pgd_at}
optimizer:
  lr: 0.1
train:
  epochs: 1
  batch_size: 32
"""

# (line of RECIPE to replace, replacement, phrases that the message must hold)
BAD_LINES = [
    ("  lr: 0.1", "  lr: 0.1\n  wieght_decay: 1e-4", ["bad.yaml:17:", "optimizer.wieght_decay", "0.0001", "'optimizer.weight_decay'", "momentum"]),
    ("  eps: 51", "  eps: abc", ["bad.yaml:11: attack.eps: expected a number, got the text 'abc'"]),
    ("  batch_size: 32", "  batch_size: 32.5", ["bad.yaml:19: train.batch_size: expected a whole number, got the number 32.5"]),
    ("  batch_size: 32", "  batch_size: -4", ["bad.yaml:19: train.batch_size: must be greater than 0, got -4"]),
    ("  dataset: digits", "  dataset: cifar11", ["bad.yaml:3: data.dataset: 'cifar11'", "Did you mean 'cifar10'?", "Allowed: digits, cifar10, cifar100, svhn, imagenet"]),
    ("  arch: preact_resnet", "  arch: resent50", ["bad.yaml:6: model.arch: 'resent50'", "Did you mean 'resnet50'?"]),
    ("objective: {name: pgd_at}", "objective: {name: tradse}", ["bad.yaml:14: objective.name: 'tradse'", "Did you mean 'trades'?", f"Allowed: {', '.join(OBJECTIVES)}"]),
    ("objective: {name: pgd_at}", "objective: {beta: 6}", ["bad.yaml:14: objective.name: required", ", ".join(OBJECTIVES)]),
    ("objective: {name: pgd_at}", "objective: {name: trades, bta: 6}", ["bad.yaml:14: objective.bta: unknown key", "value 6", "'objective.beta'", "clean_forwards"]),
    ("  block: basic", "  block: basic\n  blocks: [2]", ["bad.yaml:9: key 'blocks' is given twice (first in line 7)"]),
    ("  epochs: 1", "  epoch: 1", ["bad.yaml:18: train.epoch: unknown key", "'train.epochs'", "train.epochs: required, but not given"]),
    ("  lr: 0.1", "  lr: true", ["bad.yaml:16: optimizer.lr: expected a number, got true"]),
    ("  lr: 0.1", "  lr: null", ["bad.yaml:16: optimizer.lr: expected a number, got null"]),
    ("  lr: 0.1", "  lr: .nan", ["bad.yaml:16: .nan is not a finite number"]),
    ("  blocks: [1]", "  blocks: 1", ["bad.yaml:7: model.blocks: expected a list, or null, got the number 1"]),
    ("  blocks: [1]", "  blocks: [1, x]", ["bad.yaml:7: model.blocks.1: expected a whole number, got the text 'x'"]),
    ("  eps: 51", "  eps: 0.2", ["bad.yaml:11: attack: eps is in /255 units", "write eps: 51"]),
    ("  batch_size: 32", "  batch_size: 32\n  bn_group_size: 5", ["bad.yaml:19: train: batch_size 32 is not a multiple of bn_group_size 5"]),
    ("  base_width: 8", "  base_width: 8\n  norm: mbn", ["bad.yaml:10: model.norm 'mbn' needs an objective that trains both branches"]),
    ("train:", "trian:", ["bad.yaml:17: trian: unknown key", "Did you mean 'train'?", "train: required, but not given"]),
    ("name: tiny", "name: my run", ["bad.yaml:1: name: 'my run' is not allowed", "letters, digits"]),
    ("  lr: 0.1", "  lr: [0.1", ["bad.yaml:17: not valid YAML"]),
    ("  lr: 0.1", "\t lr: 0.1", ["bad.yaml:16: not valid YAML"]),
    ("objective: {name: pgd_at}", "objective: {name: pgd_at}\n<<: {seed: 1}", ["bad.yaml:15:", "use extends:"]),
    ("name: tiny", "extends: tniy.yaml", ["bad.yaml:1: extends: no recipe 'tniy.yaml'"]),
    ("name: tiny", "extends: 3", ["bad.yaml:1: extends: expected a reference"]),
]  # fmt: skip

BAD_OVERRIDES = [
    (["optimiser.lr=0.2"], ["override 'optimiser.lr=0.2': optimiser", "unknown key", "Did you mean 'optimizer'?"]),
    (["lr=0.2"], ["override 'lr=0.2': lr: unknown key 'lr' (value 0.2)", "Did you mean 'optimizer.lr'?"]),
    (["train.batch_size=abc"], ["override 'train.batch_size=abc': train.batch_size: expected a whole number, got the text 'abc'"]),
    (["attack.bn_mode=evla"], ["'evla'", "Did you mean 'eval'?", "Allowed: eval, batch, train"]),
    (["parallel.zero_stage=3"], ["parallel.zero_stage: 3", "Allowed: 0, 1, 2"]),
    (["train.bn_group_size=5"], ["override 'train.bn_group_size=5': train: batch_size 32 is not a multiple"]),
    (["seed"], ["override 'seed'", "key=value"]),
    (["seed.x=1"], ["override 'seed.x=1': seed: expected a whole number, got a section with x"]),
    (["data.augment.flip=yes"], ["data.augment.flip: expected true or false, got the text 'yes'"]),
    (["attack.early_stop_epochs=[4]"], ["early_stop_epochs raise early_stop, which is null: write early_stop: 1"]),
    (["attack={early_stop: 1, early_stop_epochs: [7, 4]}"], ["early_stop_epochs must rise, got [7.0, 4.0]"]),
    (["optimizer={name: adam, lr: 0.1, betas: [0.9, 1.0]}"], ["betas lie in [0, 1), got [0.9, 1.0]"]),
    (["optimizer={name: sgd_gc, lr: 0.1}", "parallel.zero_stage=2"], ["'sgd_gc' looks at each parameter as a whole", "needs parallel.zero_stage 0, got 2"]),
    (["optimizer={name: sgd_gc, lr: 0.1, nesterov: true}"], ["nesterov needs optimizer.name: sgd and momentum > 0"]),
    (["evaluation.final=[{kind: pgd, attack: {eps: 8, num_steps: 2, step_size: 4, early_stop: 1, early_stop_epochs: [3]}}]"], ["attack.early_stop_epochs belongs to training"]),
    (["evaluation.final=[{kind: pgd, attack: {eps: 8, num_steps: 2, step_size: 4, eps_warmup_epochs: 3}}]"], ["attack.eps_warmup_epochs belongs to training"]),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def refuse(ref, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_recipe(ref, overrides)
    assert caught.value.exit_code == EXIT_CONFIG == 2
    return str(caught.value)


def test_the_recipe_itself_is_good(folder):
    assert load_recipe("tiny.yaml").config.name == "tiny"


@pytest.mark.parametrize(("line", "bad", "phrases"), BAD_LINES, ids=[bad for _, bad, _ in BAD_LINES])
def test_message_names_place_field_value_and_what_is_allowed(folder, line, bad, phrases):
    assert f"{line}\n" in RECIPE
    (folder / "bad.yaml").write_text(RECIPE.replace(f"{line}\n", f"{bad}\n"))
    message = refuse("bad.yaml")
    for phrase in phrases:
        assert phrase in message
    for internal in ("pydantic", "Value error", "type=", "errors.pydantic.dev", "pgd_at.", "union"):
        assert internal not in message


@pytest.mark.parametrize(("overrides", "phrases"), BAD_OVERRIDES, ids=[o[0] for o, _ in BAD_OVERRIDES])
def test_override_is_named_as_it_was_typed(folder, overrides, phrases):
    message = refuse("tiny.yaml", overrides)
    for phrase in phrases:
        assert phrase in message


def test_several_errors_are_listed_together(folder):
    message = refuse("tiny.yaml", ["train.batch_size=abc", "optimizer.lr=-1", "log.wandb=maybe"])
    assert message.startswith("3 errors in tiny.yaml:\n")
    assert all(part in message for part in ("train.batch_size", "optimizer.lr", "Allowed: off, offline, online"))


def test_error_in_a_base_names_the_base_and_its_line(folder):
    (folder / "child.yaml").write_text("extends: tiny.yaml\nname: child\n")
    (folder / "tiny.yaml").write_text(RECIPE.replace("lr: 0.1", "lr: fast"))
    assert "tiny.yaml:16: optimizer.lr: expected a number, got the text 'fast'" in refuse("child.yaml")


def test_unknown_recipe_names_the_nearest(folder):
    message = refuse("digits/adverserial")
    assert "no recipe 'digits/adverserial'" in message
    assert "Did you mean 'digits/adversarial.yaml'?" in message


def test_unknown_row_names_the_nearest_and_all_rows(folder):
    message = refuse("cifar/bag_of_tricks/baselines.yaml#wrn34-10-evl")
    assert "no row 'wrn34-10-evl' in" in message
    assert "Did you mean 'wrn34-10-eval'?" in message
    assert "resnet18-train" in message


def test_table_without_a_row_lists_its_rows(folder):
    message = refuse("cifar/bag_of_tricks/baselines")
    assert "is a table; choose a row, e.g." in message
    assert "Rows: resnet18-train, resnet18-eval, wrn34-10-train, wrn34-10-eval" in message


def test_row_of_a_plain_recipe_is_refused(folder):
    assert "is a recipe, not a table" in refuse("tiny.yaml#row")


def test_table_keys_are_checked(folder):
    (folder / "t.yaml").write_text("bsae: tiny.yaml\nrows: {a: {seed: 1}}\n")
    assert "t.yaml:1: unknown key 'bsae' in a table file. Did you mean 'base'?" in refuse("t.yaml#a")


def test_field_given_twice_in_both_spellings_is_refused(folder):
    (folder / "t.yaml").write_text("base: tiny.yaml\nrows:\n  a:\n    optimizer.lr: 1\n    optimizer: {lr: 2}\n")
    assert "lr is given twice" in refuse("t.yaml#a")


def test_empty_and_non_mapping_files_are_refused(folder):
    (folder / "empty.yaml").write_text("# nothing\n")
    (folder / "list.yaml").write_text("- 1\n")
    assert "the file is empty" in refuse("empty.yaml")
    assert "list.yaml:1: a recipe is a mapping of sections" in refuse("list.yaml")


def test_python_tags_run_nothing(folder):
    (folder / "evil.yaml").write_text("name: !!python/object/apply:os.system ['touch pwned']\n")
    assert "is not allowed in a recipe" in refuse("evil.yaml")
    assert not (folder / "pwned").exists()
