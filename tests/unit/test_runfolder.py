"""One recipe a folder, and a fresh start that loses nothing."""

from __future__ import annotations

import pytest

from distributed_at.engine.runs.folder import RunFolder
from distributed_at.errors import ConfigError
from distributed_at.recipes import load_recipe
from tests.training_kit import RECIPE, TINY


def config(*words: str):
    return load_recipe(str(RECIPE), [*TINY, *words]).config


def test_another_recipe_is_refused_with_the_difference_and_the_same_one_goes_on(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert not folder.check(config())
    folder.prepare(config())
    assert folder.check(config())
    assert folder.load_config() == config()
    with pytest.raises(ConfigError, match=r"(?s)holds another recipe.*attack\.eps") as caught:
        folder.check(config("attack.eps=52"))
    assert "51" in str(caught.value)
    assert "52" in str(caught.value)
    with pytest.raises(ConfigError, match="another recipe"):
        folder.check(config("seed=1"))


def test_the_recipe_that_a_run_was_started_with_is_never_written_over(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(config())
    folder.prepare(config("seed=1"))
    assert folder.load_config().seed == 0


def test_fresh_starts_set_events_and_checkpoints_aside_each_time(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.prepare(config())
    for number in (1, 2):
        folder.events.write_text(f"start {number}")
        (folder.checkpoints / f"step_0000000{number}").mkdir()
        assert folder.has_checkpoints
        folder.set_aside()
        assert not folder.has_checkpoints
        assert not folder.events.exists()
    for number in (1, 2):
        assert (folder.root / f"events.jsonl.old-{number}").read_text() == f"start {number}"
        assert (folder.root / f"checkpoints.old-{number}" / f"step_0000000{number}").is_dir()
    assert folder.load_config() == config()


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "run").check(config())
