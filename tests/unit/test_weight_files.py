"""Weights come in out of the wrappings of other codes, with their normaliser compared, and go out with their meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from distributed_at.config import ModelConfig
from distributed_at.engine.checkpoint import tools
from distributed_at.engine.checkpoint.weight_files import read_weight_file
from distributed_at.engine.runs.initial_weights import apply_initial_weights, read_initial_weights
from distributed_at.errors import CheckpointError, ConfigError
from distributed_at.models import build_model
from tests.integration.training import tiny, train

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
CONFIG = ModelConfig(
    arch="resnet", blocks=(1, 1), block="basic", base_width=8, stem="cifar", pixel_mean=MEAN, pixel_std=STD
)


def network(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(CONFIG, num_classes=10, image_size=8)


STATE = network().state_dict()


def behind(prefix: str, state: dict[str, torch.Tensor] = STATE) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def pixels(*names: str, shape: tuple[int, ...] = (3, 1, 1)) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(values).view(shape) for name, values in zip(names, (MEAN, STD), strict=True)}


FORMS: dict[str, tuple[Any, bool]] = {
    "plain": (STATE, False),
    "kuangliu": ({"net": behind("module."), "acc": 95.2, "epoch": 3}, False),
    "TRADES": (behind("module."), False),
    "torch.compile": ({"state_dict": behind("_orig_mod.")}, False),
    "compiled and parallel": ({"model_state_dict": behind("_orig_mod.module.")}, False),
    "MadryLab": (
        {
            "model": {
                **behind("module.model."),
                **behind("module.attacker.model."),
                **pixels("module.normalizer.new_mean", "module.normalizer.new_std"),
                **pixels("module.attacker.normalize.new_mean", "module.attacker.normalize.new_std"),
            },
            "epoch": 7,
        },
        True,
    ),
    "RobustBench": ({**behind("model."), **pixels("mu", "sigma", shape=(1, 3, 1, 1))}, True),
    "Sequential": ({**behind("1."), **pixels("0.mean", "0.std")}, True),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_come_out_of_the_wrappings_of_other_codes(form: str, tmp_path: Path) -> None:
    content, normalised = FORMS[form]
    torch.save(content, tmp_path / "weights.pt")
    target = network(1)
    source = str(tmp_path / "weights.pt")
    apply_initial_weights(target, read_initial_weights(source, model=CONFIG, own=target.state_dict()), source)
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in target.state_dict().items())
    file = read_weight_file(tmp_path / "weights.pt")
    assert (file.mean is not None) == normalised
    if normalised:
        assert file.mean == pytest.approx(MEAN)
        other = CONFIG.model_copy(update={"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (1.0, 1.0, 1.0)})
        told = r"normaliser of mean \[0.4914, 0.4822, 0.4465\] .* write model.pixel_mean=\[0.4914, 0.4822, 0.4465\]"
        with pytest.raises(ConfigError, match=told):
            read_initial_weights(source, model=other, own=target.state_dict())


def test_names_that_a_network_has_itself_are_not_taken_for_a_wrapping(tmp_path: Path) -> None:
    inner = torch.nn.Module()
    inner.model = torch.nn.Linear(2, 3)
    torch.save(inner.state_dict(), tmp_path / "weights.pt")
    found = read_initial_weights(str(tmp_path / "weights.pt"), own=inner.state_dict())
    assert set(found) == {"model.weight", "model.bias"}


def test_a_refusal_names_the_prefix_or_the_nesting_that_it_saw(tmp_path: Path) -> None:
    target, source = network(1), str(tmp_path / "weights.pt")
    torch.save(behind("encoder."), source)
    with pytest.raises(ConfigError, match=r"Their names begin with 'encoder.', which this network's do not"):
        apply_initial_weights(target, read_initial_weights(source, own=target.state_dict()), source)
    torch.save({"generator": {"weights": STATE}, "step": 3}, source)
    with pytest.raises(
        CheckpointError, match=r"it holds keys 'generator', 'step'; a state dict may stand under state_dict"
    ):
        read_initial_weights(source)


def test_weights_leave_with_what_they_need_to_mean_something(tmp_path: Path) -> None:
    run = train(tiny("model.pixel_mean=[0.1, 0.2, 0.3]", "model.pixel_std=[0.5, 0.6, 0.7]"), tmp_path / "run")
    for source in (run, max((run / "checkpoints").glob("step_*"))):
        for suffix in (".safetensors", ".pt"):
            written = tools.checkpoint_convert(source, tmp_path / f"out{suffix}")
            about = read_weight_file(written).about
            assert (about["pixel_mean"], about["pixel_std"]) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
            assert about["class_names"] == [str(digit) for digit in range(10)]
            assert (about["num_classes"], about["image_size"], about["dataset"]) == (10, 8, "digits")
            assert about["model"]["arch"] == "resnet"
            again = tools.checkpoint_convert(written, tmp_path / f"again{suffix}")
            assert read_weight_file(again).about == about
            with pytest.raises(ConfigError, match="came with a normaliser"):
                read_initial_weights(str(written), model=CONFIG)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["distributed_at"])["model"]["blocks"] == [1, 1]
