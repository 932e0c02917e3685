"""Hundreds of generated mistakes in commands and recipes: refused with exit code 2, one short message, nothing on disk.

Each is wrong by construction: a mutation that happens to be right is left out. None may start a worker.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from distributed_at.cli import VERBS, build_parser, main
from distributed_at.recipe_errors import field_paths

RECIPE = "digits/adversarial.yaml"
_LETTERS = "abcdefghijklmnopqrstuvwxyz_"


def typo(word: str, chance: random.Random) -> str:
    """One edit: a letter left out, doubled, swapped with the next, or another one."""
    at = chance.randrange(len(word))
    return chance.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
            word[:at] + chance.choice(_LETTERS) + word[at + 1 :],
        ]
    )


def mistyped(right: list[str], count: int, chance: random.Random) -> Iterator[str]:
    """``count`` words, each an edit away from one of ``right`` and none of them."""
    while count:
        wrong = typo(chance.choice(right), chance)
        if wrong not in right and wrong.strip("._-") and wrong[0] not in "-.":
            count -= 1
            yield wrong


def verbs_and_options() -> Iterator[list[str]]:
    chance = random.Random(1)
    for wrong in mistyped(list(VERBS), 30, chance):
        yield [wrong, RECIPE]
    parser = build_parser()
    for verb in VERBS:
        inner = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[verb]
        options = [o.removeprefix("--") for a in inner._actions for o in a.option_strings if o.startswith("--")]
        needed = [a for a in inner._actions if not a.option_strings and a.nargs is None and a.dest != "overrides"]
        for wrong in mistyped(options, 4, chance):
            yield [verb, *(["x"] if needed else []), f"--{wrong}"]


def keys() -> Iterator[list[str]]:
    chance = random.Random(2)
    known = field_paths()
    for wrong in mistyped(known, 60, chance):
        if wrong.split(".")[0] in {"init", "name"}:
            continue
        yield [chance.choice(["plan", "train"]), RECIPE, f"{wrong}=1"]
    for right in chance.sample([path for path in known if "." in path], 20):
        yield ["plan", RECIPE, right, "1"]  # no '='
        yield ["plan", RECIPE, right, "=", "1"]
        yield ["plan", RECIPE, f"{right}=", "1"]
        yield ["plan", RECIPE, right, "=1"]
        yield ["plan", RECIPE, f"--{right}", "1"]
        yield ["plan", RECIPE, f"{right.replace('.', '[', 1)}]=1"]


def values() -> Iterator[list[str]]:
    numbers = ["optimizer.lr", "train.epochs", "train.batch_size", "attack.eps", "attack.num_steps", "attack.step_size"]
    wrong = [
        "abc",
        "nan",
        ".nan",
        ".inf",
        "-1",
        "1e999",
        "8px",
        "0,1",
        "10k",
        "1_000",
        "[1]",
        "{a: 1}",
        "",
        "true",
        "1 2",
    ]
    for number in numbers:
        for value in wrong:
            yield ["plan", RECIPE, f"{number}={value}"]
    for field in ("objective.name", "model.norm", "data.dataset", "optimizer.name", "schedule.name", "attack.loss"):
        for value in ("", "5", "null", "x" * 5000, "[a, b]", "Ünbekannt"):
            yield ["plan", RECIPE, f"{field}={value}"]
    for value in ("", "a" * 300, "a b", "../x", "a/b", "-a", "ä", "[1]"):
        yield ["train", RECIPE, f"name={value}"]
    for option in ("0", "-1", "two", "1.5", "nan", "", "9" * 40):
        yield ["train", RECIPE, "--workers", option]
        yield ["plan", RECIPE, "--workers", option]
    yield ["plan", RECIPE, "--gpu", "h20000"]


def pasted() -> Iterator[list[str]]:
    for dash in "—–−‒‑":
        yield ["train", RECIPE, f"{dash}workers", "1"]
        yield ["train", RECIPE, f"{dash}{dash}quiet"]
    for left, right in ("“”", "‘’", "«»"):
        yield ["plan", RECIPE, f"name={left}mine{right}"]
        yield ["plan", RECIPE, f"{left}optimizer.lr=0.1{right}"]
    for word in ("optimizer.lr＝0.1", "optimizer.lr=0.1\u00a0", "optimizer.lr\u200b=0.1", "\ufeffoptimizer.lr=0.1"):
        yield ["plan", RECIPE, word]


def swapped_and_repeated() -> Iterator[list[str]]:
    yield from (
        [RECIPE, "plan"],
        ["plan"],
        ["plan", "optimizer.lr=0.1"],
        ["train", RECIPE, RECIPE],
        ["train", RECIPE, "cifar/smoke.yaml", "train.epochs=1"],
        ["eval", RECIPE],
        ["eval", "A", "B"],
        ["report", RECIPE],
        ["status"],
        ["recipes", RECIPE, "show"],
        ["recipes", "show"],
        ["recipes", "show", RECIPE, "more"],
        ["checkpoint", "diff", "a"],
        ["checkpoint", "verify", "nowhere"],
        ["data", "verify"],
        ["data", "nowhere", "verify"],
        ["bench", "nowhere"],
        ["bench", "precision", "nowhere"],
        ["figures", "nowhere"],
        ["doctor", RECIPE, "other"],
        ["plan", RECIPE, "optimizer.lr=0.1", "optimizer.lr=0.2"],
        ["plan", RECIPE, "--workers", "1", "--workers", "2"],
        ["train", RECIPE, "--runs", "a", "--runs", "b"],
        ["status", "x", "optimizer.lr=0.1"],
        ["plan", "digits/adversarial.yaml#row"],
        ["plan", "cifar/bag_of_tricks/table8.yaml"],
        ["plan", "cifar/bag_of_tricks/table8.yaml#nothing"],
        ["plan", "x" * 5000],
        ["plan", "a\x00b"],
        ["train", RECIPE, "init=nowhere"],
        ["train", RECIPE, "train.init_from=nowhere"],
        ["plan", RECIPE, "plugins=[nowhere.py]"],
        ["plan", RECIPE, "=5"],
        ["plan", RECIPE, ".=5"],
        ["plan", RECIPE, "evaluation.final.99.kind=clean"],
        ["plan", RECIPE, "evaluation.final[0].kind=clean"],
        ["plan", RECIPE, "evaluation.final=clean"],
    )


def recipes() -> Iterator[str]:
    """Texts of recipe files, each wrong."""
    chance = random.Random(3)
    for wrong in mistyped([path for path in field_paths() if path.count(".") == 1], 60, chance):
        section, dot, key = wrong.partition(".")
        yield (
            f"extends: {RECIPE}\n{section}: {{{key}: 1}}\n"
            if dot and section and key
            else f"extends: {RECIPE}\n{wrong}: 1\n"
        )
    yield from (
        "",
        "5\n",
        "- a\n",
        "extends: nowhere.yaml\n",
        "extends: [1]\n",
        "extends: mine.yaml\n",
        f"extends: {RECIPE}\nattack: {{eps: 8\n",
        f"extends: {RECIPE}\n\tattack: 1\n",
        f"extends: {RECIPE}\nattack: 5\n",
        f"extends: {RECIPE}\nattack: []\n",
        f"extends: {RECIPE}\nseed: 1\nseed: 2\n",
        f"extends: {RECIPE}\noptimizer: {{lr: 0.1}}\noptimizer.lr: 0.2\n",
        f"extends: {RECIPE}\noptimizer: !!python/object:os.system {{}}\n",
        f"extends: {RECIPE}\n? [a]\n: 1\n",
        f"extends: {RECIPE}\n<<: {{seed: 1}}\n",
        "a: &a [*a]\n",
        f"extends: {RECIPE}\nmodel: &m {{arch: *m}}\n",
        "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
        "a: " + "[" * 3000 + "]" * 3000 + "\n",
        "x" * 100_000 + "\n",
        "rows: {}\n",
        "rows: {a: 1}\n",
        "rows: 5\n",
        f"base: {RECIPE}\nrows: {{a: {{}}}}\nbsae: 1\n",
        f"extends: {RECIPE}\nplugins: 5\n",
        f"extends: {RECIPE}\ntrain: {{epochs: .nan}}\n",
    )  # fmt: skip


COMMANDS = [*verbs_and_options(), *keys(), *values(), *pasted(), *swapped_and_repeated()]
FILES = list(recipes())


@pytest.fixture(autouse=True)
def _no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for verb in ("train", "eval"):
        monkeypatch.setattr(f"distributed_at.commands.{verb}.run_workers", lambda *a: pytest.fail("workers started"))


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that is wrong; return what it said of it, having checked that it said it well."""
    try:
        code = main(words)
    except SystemExit as leaving:
        code = leaving.code
    out, err = capsys.readouterr()
    said = err[err.rfind("distributed-at: error:") :]
    shown = f"{words!r}"[:300]
    assert code == 2, f"{shown}: exit code {code}: {err[-500:]}{out[-200:]}"
    assert "Traceback" not in err, shown
    assert said.startswith("distributed-at: error:"), f"{shown}: {err[-300:]}"
    assert len(said) < 2000, f"{shown}: a message of {len(said)} characters"
    assert not list(Path.cwd().iterdir()) or [p.name for p in Path.cwd().iterdir()] == ["mine.yaml"], shown
    return said


def test_there_are_enough_mistakes() -> None:
    assert len(COMMANDS) + len(FILES) >= 500


@pytest.mark.parametrize("part", range(8))
def test_mistakes_in_commands_are_refused(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    for words in COMMANDS[part::8]:
        refusal(words, capsys)


@pytest.mark.parametrize("part", range(2))
def test_mistakes_in_recipes_are_refused(part: int, capsys: pytest.CaptureFixture[str]) -> None:
    for text in FILES[part::2]:
        Path("mine.yaml").write_text(text, encoding="utf-8")
        refusal(["plan", "mine.yaml"], capsys)
