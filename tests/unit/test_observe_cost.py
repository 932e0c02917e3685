"""Costs by hand count: forward-equivalents, FLOPs, MFU, durations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distributed_at.config import AttackConfig
from distributed_at.cost import (
    attack_units,
    format_seconds,
    forward_flops,
    gpu_hours,
    mfu,
    peak_rate,
    recipe_units,
    seconds_left,
)


def recipe(name: str, num_steps: int = 30, **objective: object) -> dict:
    attack = None if name == "standard" else {"eps": 8, "step_size": 1, "num_steps": num_steps}
    return {"objective": {"name": name, **objective}, "attack": attack}


@pytest.mark.parametrize(("num_steps", "total"), [(1, 5), (2, 7), (3, 9), (7, 17), (10, 23), (30, 63)])
def test_pgd_costs_two_units_a_step_and_three_to_train(num_steps: int, total: int) -> None:
    assert recipe_units(recipe("pgd_at", num_steps)).total == total


def test_objectives_pay_for_their_clean_passes() -> None:
    assert recipe_units(recipe("standard")).total == 3
    assert recipe_units(recipe("mixture", clean_ratio=1.0)).total == 66
    assert recipe_units(recipe("mixture", clean_ratio=0.2)).total == pytest.approx(63.6)
    assert recipe_units(recipe("trades", 10)).total == 26
    assert recipe_units(recipe("trades", 10, clean_forwards="twice")).total == 29
    assert recipe_units(recipe("pgd_at", 10, bn_clean_updates_per_step=2)).total == 25


def test_kl_attack_and_restarts_pay_for_their_extra_forwards() -> None:
    def units(**fields: object) -> float:
        return attack_units(AttackConfig(eps=8, step_size=1, num_steps=10, **fields))

    assert units(loss="kl") == units(target="least_likely") == units(final_forward=True, bn_mode="train") == 21
    assert units(loss="kl", reference_forward="each_step", bn_mode="train") == 30
    assert units(restarts=2) == units(restarts=2, final_forward=True, bn_mode="train") == 42
    assert units(loss="kl", reference_forward="each_step", restarts=3, bn_mode="train") == 93
    # where statistics stand still, neither changes anything
    assert units(loss="kl", reference_forward="each_step") == 21
    assert units(final_forward=True) == 20


def test_recomputed_activations_cost_one_more_forward_in_training_alone() -> None:
    units = recipe_units({**recipe("pgd_at"), "model": {"activation_checkpointing": True}})
    assert (units.attack, units.train) == (60, 4)


def test_flops_count_a_multiply_add_as_two_and_meta_computes_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16, 10, bias=False)
        )
    assert forward_flops(model, image_size=4) == 2 * (3 * 8 * 9 * 16 + 8 * 16 * 10)
    assert model.training


def test_mfu_is_one_at_the_peak_and_unknown_devices_have_none() -> None:
    arguments = {"images_per_second": 989.5e12 * 8, "flops_per_image": 1.0, "num_devices": 8}
    assert mfu(device_name="NVIDIA H200", **arguments) == pytest.approx(1)
    assert mfu(device_name="Some New Card", **arguments) is None


def test_longer_device_names_win_over_shorter() -> None:
    assert peak_rate("NVIDIA H100 PCIe").half == 756e12
    assert peak_rate("NVIDIA H100 80GB HBM3").half == 989.5e12


def test_durations_and_hours() -> None:
    assert gpu_hours(1800, 8) == 4
    assert seconds_left(step=10, total_steps=20, seconds_per_step=2) == 20
    assert seconds_left(step=10, total_steps=20, seconds_per_step=float("nan")) is None
    assert [format_seconds(s) for s in (2.04, 48, 725, 12000, 187200, None)] == [
        "2.0 s", "48 s", "12 m 05 s", "3 h 20 m", "2 d 4 h", "–",
    ]  # fmt: skip
