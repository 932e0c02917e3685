"""A user's own attack: the file that docs/attacks.md prints, planned, trained, resumed bitwise and evaluated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from distributed_at.attacks import PGD, Threat
from distributed_at.attacks.page import attacks_page
from distributed_at.catalogue.attacks import ATTACK_LOSSES, ATTACK_UPDATES
from distributed_at.engine.runs.evaluate_run import evaluate_run
from distributed_at.errors import ConfigError
from distributed_at.planning import make_plan
from distributed_at.recipes import load_recipe
from tests.integration.training import TINY, cut_back, same_bits, tensors, train

PAGE = Path(__file__).parents[2] / "docs" / "attacks.md"


@pytest.fixture
def recipe(tmp_path: Path):
    """The page's plug-in beside a recipe that trains and evaluates with it."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[1]
    (tmp_path / "mine.py").write_text(code)
    attack = "{eps: 16, num_steps: 3, step_size: 8, loss: least_margin, update: momentum}"
    (tmp_path / "mine.yaml").write_text("extends: digits/adversarial.yaml\nname: mine\nplugins: [mine.py]\n")
    words = [word for word in TINY if not word.startswith(("attack=", "evaluation="))]
    final = f"evaluation={{every_epochs: null, validation: [], final: [{{kind: pgd, attack: {attack}}}]}}"
    yield lambda *more: load_recipe(str(tmp_path / "mine.yaml"), [*words, f"attack={attack}", final, *more]).config
    for registry, name in ((ATTACK_LOSSES, "least_margin"), (ATTACK_UPDATES, "momentum")):
        if name in registry:
            registry.remove(name)


def test_page_is_what_the_entries_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == attacks_page(), "run: python -m distributed_at.attacks.page"


def test_attack_of_a_plugin_is_planned_trained_resumed_and_evaluated(recipe, tmp_path: Path) -> None:
    config = recipe()
    assert make_plan(config).attack_units == 6
    whole = train(config, tmp_path / "whole")
    again = train(config, cut_back(whole, tmp_path / "again", 8))
    last, other = tensors(whole, 16), tensors(again, 16)
    assert all(same_bits(tensor, other[name]) for name, tensor in last.items())
    (result,) = evaluate_run(whole).results
    assert result.protocol.name == "PGD-3 least_margin momentum linf 16/255"
    assert result.total == 16
    with pytest.raises(ConfigError, match=r"attack.update: 'momentun'.*Did you mean 'momentum'"):
        recipe("attack.update=momentun")


def test_gradient_of_a_plugin_s_update_may_be_compiled(recipe) -> None:
    """A compiler, or a graph, sees the gradient alone; the rule's state stays beside it."""
    attack = PGD.from_config(recipe().attack, num_classes=10, fused=False)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(144, 10))
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    compiled = torch.compile(attack.iteration(model.eval(), functional=True), backend="aot_eager", fullgraph=True)
    assert torch.allclose(attack.perturb(model, x, y, iteration=compiled), attack.perturb(model, x, y), atol=1e-6)


def test_entry_that_is_none_is_told() -> None:
    with pytest.raises(ConfigError, match=r"mine.py: attack loss 'mine' must be of AttackLoss, got <function"):
        ATTACK_LOSSES.add("mine", lambda z, goal: z.sum(1), origin="mine.py")


def test_loss_made_on_the_spot_needs_no_registry() -> None:
    from distributed_at.attacks import AttackLoss

    mine = AttackLoss(title="first logit", source="", function=lambda z, goal: z[:, 0])
    attack = PGD(threat=Threat("linf", 0.1), num_steps=2, step_size=0.05, loss=mine, start="zero")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).double()
    x = torch.full((2, 3, 2, 2), 0.5, dtype=torch.float64)
    moved = attack.perturb(model, x, torch.tensor([0, 1])) - x
    assert torch.allclose(moved.flatten(1), 0.1 * model[1].weight[0].sign().expand(2, 12))
