"""Which numbers of a run are its network's: the selected checkpoint, the averaged weights, and whose statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed_at.config import RunConfig
from distributed_at.engine.builder import build_network
from distributed_at.engine.checkpoint.manager import CheckpointManager
from distributed_at.engine.checkpoint.state import BUFFER, EMA, MODEL
from distributed_at.engine.runs.folder import RunFolder
from distributed_at.engine.runs.initial_weights import read_initial_weights
from distributed_at.engine.runs.weights import find_checkpoint, load_network
from distributed_at.errors import CheckpointError
from distributed_at.recipes import load_recipe
from tests.training_kit import RECIPE, TINY

CLASSES = 10
BEST = [
    "data.validation_size=30", "evaluation.validation=[{kind: clean}]", "evaluation.every_epochs=1",
    "train.select=best_validation",
]  # fmt: skip
AVERAGED = {kind: [f"train.ema={{decay: 0.9, buffers: {kind}}}"] for kind in ("average", "copy_live")}
Saved = dict[str, torch.Tensor]


def saved(root: Path, *words: str) -> tuple[RunConfig, RunFolder, CheckpointManager, dict[int, Saved]]:
    """Write a run of two checkpoints, the first one marked best, whose every tensor has values of its own."""
    config = load_recipe(str(RECIPE), [*TINY, *words]).config
    folder = RunFolder(root)
    folder.prepare(config)
    network = build_network(config, CLASSES)
    parameters = dict(network.named_parameters())
    ema = config.train.ema
    manager = CheckpointManager(folder.checkpoints)
    states: dict[int, Saved] = {}
    for step in (1, 2):
        generator = torch.Generator().manual_seed(step)
        state: Saved = {}
        for name, tensor in network.state_dict().items():
            floating = tensor.is_floating_point()
            kinds = [MODEL if name in parameters else BUFFER]
            if ema is not None and (name in parameters or (ema.buffers == "average" and floating)):
                kinds.append(EMA)
            for kind in kinds:
                values = torch.rand(tensor.shape, generator=generator) + 0.5
                state[kind + name] = values if floating else torch.tensor(step * 11)
        states[step] = state
        assert manager.save(step, state, {}).ok
    manager.mark_best(1, 0.5)
    return config, folder, manager, states


def holds(found: Saved, state: Saved, parameters: str, statistics: str, names: set[str]) -> bool:
    """Whether each tensor is the one saved as ``parameters``, or ``statistics`` where it is no parameter."""
    for name, tensor in found.items():
        kind = parameters if name in names else statistics if tensor.is_floating_point() else BUFFER
        if not torch.equal(tensor, state[kind + name]):
            return False
    return True


CASES = [
    ("average", True, EMA, EMA),
    ("average", False, MODEL, BUFFER),
    ("copy_live", True, EMA, BUFFER),
    ("copy_live", False, MODEL, BUFFER),
    (None, True, MODEL, BUFFER),
]


@pytest.mark.parametrize(("buffers", "average", "parameters", "statistics"), CASES)
def test_network_of_a_run_has_the_weights_and_statistics_that_its_recipe_means(
    buffers, average, parameters, statistics, tmp_path
):
    words = AVERAGED[buffers] if buffers else []
    config, folder, manager, states = saved(tmp_path / "run", *words)
    path = folder.checkpoints / "step_00000002"
    network = load_network(config, manager, path, num_classes=CLASSES, average=average)
    names = set(dict(network.named_parameters()))
    assert holds(network.state_dict(), states[2], parameters, statistics, names)
    assert not network.training


def test_auto_is_the_checkpoint_that_the_recipe_selects(tmp_path):
    config, folder, manager, _ = saved(tmp_path / "best", *BEST)
    first, second = (folder.checkpoints / f"step_0000000{n}" for n in (1, 2))
    asked = {"auto": first, "best": first, "last": second, "step_00000002": second, str(first): first}
    assert {which: find_checkpoint(folder, manager, which, config) for which in asked} == asked
    config, folder, manager, _ = saved(tmp_path / "last")
    assert find_checkpoint(folder, manager, "auto", config).name == "step_00000002"
    with pytest.raises(CheckpointError, match="no checkpoint 'step_9'"):
        find_checkpoint(folder, manager, "step_9", config)


@pytest.mark.parametrize("buffers", ["average", "copy_live", None])
@pytest.mark.parametrize("selects", [True, False])
def test_a_run_begun_from_another_takes_what_an_evaluation_of_that_would(selects, buffers, tmp_path):
    words = [*(BEST if selects else []), *(AVERAGED[buffers] if buffers else [])]
    config, folder, manager, _ = saved(tmp_path / "run", *words)
    state = read_initial_weights(str(folder.root))
    judged = load_network(
        config, manager, find_checkpoint(folder, manager, "auto", config), num_classes=CLASSES
    ).state_dict()
    assert state.keys() == judged.keys()
    assert [name for name in state if not torch.equal(state[name], judged[name])] == []
