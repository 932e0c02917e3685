"""`make gpu-train`: each call goes on where the one before was asked to stop, and ends beside the paper's numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gpu_train
from tests.training_kit import TINY, checkpoint_step

RECIPE = """
extends: {digits}
name: short-row
paper: {{title: A paper, table: Table 2, row: Base, numbers: {{clean: 82.5, pgd2: 53.5}}}}
evaluation:
  validation: []
  final:
    - {{kind: clean}}
    - {{kind: pgd, attack: {{eps: 51, num_steps: 2, step_size: 12.75}}}}
    - {{kind: autoattack}}
"""


@pytest.mark.slow
def test_a_second_call_goes_on_and_prints_the_paper_beside_its_own_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = Path(__file__).parents[2] / "digits" / "adversarial.yaml"
    (tmp_path / "row.yaml").write_text(RECIPE.format(digits=digits))
    runs = tmp_path / "runs"
    folder = runs / "short-row"
    settings = [word for word in TINY if not word.startswith(("train.epochs", "evaluation."))]
    words = ["gpu_train", str(tmp_path / "row.yaml"), *settings, "train.epochs=100000", "--runs", str(runs)]
    monkeypatch.setattr(sys, "argv", [*words, "--samples", "50"])

    def until_more_steps_are_logged(_: float) -> Callable[[], bool]:
        before = gpu_train.last_event(folder, "train").get("step", 0)
        return lambda: gpu_train.last_event(folder, "train").get("step", 0) > before

    monkeypatch.setattr(gpu_train, "after", until_more_steps_are_logged)
    stops = []
    for call in range(2):
        assert gpu_train.main() == 0
        told = capsys.readouterr().out
        stops.append(checkpoint_step(folder))
        assert "UNFINISHED: give the same command again to go on" in told
        assert "the paper's row: A paper, Table 2, Base: clean 82.5, pgd2 53.5" in told
        assert "82.50" in told
        assert "53.50" in told
        assert "autoattack" not in told.lower()
        assert (f"resumed the run at step {stops[0]}; it now stands at step {stops[-1]}" in told) == (call == 1)
    assert 0 < stops[0] < stops[1]
