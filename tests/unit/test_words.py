"""Every word of a command is understood or refused, by one rule for all verbs; the message says what to write."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest

from distributed_at.cli import VERBS, build_parser, main
from distributed_at.commands.words import split_words

RECIPE = "digits/adversarial.yaml"
RIGHT = {  # a command of each verb that has every argument it needs
    "train": ["train", RECIPE],
    "eval": ["eval", "RUN"],
    "status": ["status", "RUN"],
    "report": ["report", "RUN"],
    "figures": ["figures", "RUN"],
    "plan": ["plan", RECIPE],
    "recipes": ["recipes", "show", RECIPE],
    "data": ["data", "index", "FOLDER"],
    "bench": ["bench", "precision", "RUN"],
    "checkpoint": ["checkpoint", "ls", "RUN"],
    "doctor": ["doctor", RECIPE],
}
TAKES_MORE = {"report", "figures"}  # any number of runs


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in VERBS:  # none gets so far as to run
        monkeypatch.setattr(f"distributed_at.commands.{verb}.run", lambda args: pytest.fail(f"ran: {args}"))


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 2
    return capsys.readouterr().err.split("error: ", 1)[1].strip()


def test_every_verb_is_asked() -> None:
    assert set(RIGHT) == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "extra",
    [
        ["optimizer.lr", "0.5"],
        ["train.epochs", "=", "5"],
        ["—workers", "1"],
        ["--lr", "0.1"],
        ["a[0].b=1"],
        ["--quite"],
    ],
)
def test_no_verb_passes_over_a_word(verb: str, extra: list[str], capsys) -> None:
    if verb in TAKES_MORE and extra[0][0] not in "-—":  # names of runs: they are kept, and there is no such run
        with pytest.raises(pytest.fail.Exception, match=rf"ran: .*{re.escape(extra[0])}"):
            main([*RIGHT[verb], *extra])
    else:
        assert said([*RIGHT[verb], *extra], capsys)


@pytest.mark.parametrize("verb", sorted(set(VERBS) - TAKES_MORE))
def test_no_verb_passes_over_an_argument_too_many(verb: str, capsys) -> None:
    assert "'more'" in said([*RIGHT[verb], "more"], capsys)
    assert "'more'" in said([*RIGHT[verb], *(["--runs", "r"] if verb in ("train", "eval") else []), "more"], capsys)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizer.lr", "0.5"], "write 'optimizer.lr=0.5'"),
        (["train.epochs", "=", "5"], "write 'train.epochs=5'"),
        (["train.epochs=", "5"], "write 'train.epochs=5'"),
        (["train.epochs", "=5"], "write 'train.epochs=5'"),
        (["—workers", "1"], "write '--workers'"),
        (["--lr", "0.1"], "without dashes: optimizer.lr=0.1"),
        (["--optimizer.lr=0.1"], "without dashes: optimizer.lr=0.1"),
        (["evaluation.final[0].kind=clean"], "write 'evaluation.final.0.kind=clean'"),
        (["--worker", "2"], "Did you mean '--workers'?"),
        (["optimizr.lr", "0.1"], "Did you mean 'optimizer.lr'?"),
        (["optimizer.lr=1", "optimizer.lr=2"], "optimizer.lr is given twice: '1' and '2'"),
        (["--workers", "1", "--workers", "2"], "option --workers is given twice: '1' and '2'"),
        (["name=“mine”"], "write 'name=mine'"),
        (["other.yaml"], "'train' does not know what to do with 'other.yaml'"),
    ],
)
def test_the_message_says_what_to_write(words: list[str], told: str, capsys) -> None:
    assert told in said(["train", RECIPE, *words], capsys)


def test_words_that_are_right_are_understood_wherever_they_stand() -> None:
    words = ["train", "optimizer.lr=1", RECIPE, "--runs", "a=b", "name=x", "--workers", "2", "seed=1", "seed=1"]
    found = split_words(words, build_parser())
    assert found.overrides == ["optimizer.lr=1", "name=x", "seed=1", "seed=1"]
    assert found.rest == ["train", RECIPE, "--runs", "a=b", "--workers", "2"]  # a value may hold '='


def test_repeatable_options_may_be_repeated() -> None:
    words = ["data", "index", "F", "--split", "train", "--split", "val"]
    assert build_parser().parse_args(split_words(words, build_parser()).rest).split == ["train", "val"]
    assert isinstance(build_parser(), argparse.ArgumentParser)


def test_nearest_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(f"extends: {RECIPE}\n")
    assert main(["plan", "tinny.yaml"]) == 2
    assert "Did you mean 'tiny.yaml'?" in capsys.readouterr().err


def test_shorter_training_says_what_to_write_for_the_milestones(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "cifar/bag_of_tricks/base.yaml", "train.epochs=2"]) == 2
    assert "e.g. schedule.milestones=[1.82, 1.91]" in capsys.readouterr().err
    words = ["train.epochs=2", "schedule.milestones=[1.82, 1.91]", "--json"]
    assert main(["plan", "cifar/bag_of_tricks/base.yaml", *words]) == 0
    assert json.loads(capsys.readouterr().out)["epochs"] == 2


def test_report_into_a_folder_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    from distributed_at.errors import ConfigError
    from distributed_at.observe import report

    monkeypatch.setattr(report, "load_run", lambda folder: pytest.fail("looked at the run first"))
    with pytest.raises(ConfigError, match=r"is a folder; name a file, e\.g\. .*report\.html"):
        report.build_report(tmp_path, output=tmp_path)
    assert not list(tmp_path.iterdir())
