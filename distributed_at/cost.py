"""What adversarial training costs: forward-equivalents and FLOPs an image, MFU, GPU-hours, time left.

One forward-equivalent is one forward pass of one image; FLOPs count a multiply-add as two. Elementwise work is not
counted, as usual for MFU, so a memory-bound network shows a low MFU without anything being wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from distributed_at.catalogue.attacks import clean_forwards
from distributed_at.catalogue.datasets import recorded_dataset
from distributed_at.config import AttackConfig
from distributed_at.objectives import OBJECTIVES, Objective, recorded_objective

if TYPE_CHECKING:
    from distributed_at.config import ObjectiveSection, RunConfig


FORWARD = 1.0
INPUT_GRADIENT = 1.0  # backward through the activations alone
WEIGHT_GRADIENT = 1.0
ATTACK_STEP = FORWARD + INPUT_GRADIENT
TRAIN_PASS = FORWARD + INPUT_GRADIENT + WEIGHT_GRADIENT


@dataclass(frozen=True, kw_only=True)
class Units:
    """Forward-equivalents of one training image: the attack's and the training passes'."""

    attack: float
    train: float

    @property
    def total(self) -> float:
        """Both together."""
        return self.attack + self.train


def attack_units(attack: AttackConfig) -> float:
    """Return the forward-equivalents of a PGD attack on one image.

    A step is a forward and an input gradient. Several restarts need one more forward each to pick the worst, or
    ``looks_last``; the clean image is looked at where loss or target come from it.
    """
    last = attack.restarts * FORWARD if attack.restarts > 1 or attack.looks_last else 0.0
    steps = attack.restarts * attack.num_steps * ATTACK_STEP
    return steps + last + clean_forwards(attack) * FORWARD


def config_units(config: RunConfig) -> Units:
    """Return the forward-equivalents that one training image costs under a recipe.

    The objective says its own passes: standard 3; PGD-K 2K + 3; TRADES and full clean counterparts 2K + 6.
    """
    return _units(OBJECTIVES[config.objective.name], config.objective, config.attack, config.model.model_dump())


def recipe_units(recipe: Mapping[str, Any]) -> Units | None:
    """Return ``config_units`` of a run's recorded recipe; None where its objective is not known here."""
    found = recorded_objective(recipe.get("objective") or {})
    if found is None:
        return None
    try:
        attack = AttackConfig.model_validate_json(json.dumps(recipe["attack"])) if recipe.get("attack") else None
    except ValidationError:  # of another version, or of a plug-in that is not loaded here
        return None
    return _units(*found, attack, recipe.get("model") or {})


def _units(
    objective: type[Objective], section: ObjectiveSection, attack: AttackConfig | None, model: Mapping[str, Any]
) -> Units:
    passes = objective.passes(section)
    one_pass = TRAIN_PASS
    if model.get("activation_checkpointing"):
        one_pass += FORWARD  # activations are computed a second time in the backward pass
    spent = ATTACK_STEP * passes.attacked
    if attack and objective.needs(section).attack == "given":
        spent += attack_units(attack)
    return Units(attack=spent, train=one_pass * passes.total_trained + FORWARD * passes.watched)


def forward_flops(model: Any, *, image_size: int, channels: int = 3) -> int:
    """Return the FLOPs of one image's forward pass: convolutions and matrix products, 2 per multiply-add.

    ``model`` lies on any device; on ``meta`` nothing is computed or stored.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    parameter = next(model.parameters())
    images = torch.empty(1, channels, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    was_training = model.training
    counter = FlopCounterMode(display=False)
    try:
        model.eval()
        with torch.no_grad(), counter:
            model(images)
    finally:
        model.train(was_training)
    return int(counter.get_total_flops())


@dataclass(frozen=True, kw_only=True)
class PeakRate:
    """Dense peak rates of one GPU, FLOP/s, as its maker states them (figures 'with sparsity' halved)."""

    name: str
    half: float
    tf32: float
    fp32: float
    source: str


PEAK_RATES = (
    PeakRate(name="B200", half=2250e12, tf32=1125e12, fp32=75e12, source="NVIDIA HGX B200 datasheet, per GPU"),
    PeakRate(name="H200", half=989.5e12, tf32=494.7e12, fp32=67e12, source="NVIDIA H200 SXM datasheet"),
    PeakRate(name="H100 PCIe", half=756e12, tf32=378e12, fp32=51e12, source="NVIDIA H100 datasheet, PCIe"),
    PeakRate(name="H100", half=989.5e12, tf32=494.7e12, fp32=67e12, source="NVIDIA H100 datasheet, SXM"),
    PeakRate(name="A100", half=312e12, tf32=156e12, fp32=19.5e12, source="NVIDIA A100 datasheet"),
    PeakRate(name="V100", half=125e12, tf32=15.7e12, fp32=15.7e12, source="NVIDIA V100 datasheet, SXM2; no TF32"),
    PeakRate(name="L40S", half=362e12, tf32=183e12, fp32=91.6e12, source="NVIDIA L40S datasheet"),
    PeakRate(name="4090", half=165.2e12, tf32=82.6e12, fp32=82.6e12, source="NVIDIA Ada whitepaper, fp32 accumulate"),
    PeakRate(name="3090", half=71e12, tf32=35.6e12, fp32=35.6e12, source="NVIDIA Ampere GA102 whitepaper"),
)


def peak_rate(device_name: str) -> PeakRate | None:
    """Return the table's entry for a device name as the driver gives it, or None for an unknown one."""
    words = device_name.upper()
    for rate in PEAK_RATES:
        if all(part.upper() in words for part in rate.name.split()):
            return rate
    return None


def mfu(
    *, images_per_second: float, flops_per_image: float, num_devices: int, device_name: str, precision: str = "bf16"
) -> float | None:
    """Return the share of the devices' peak rate that training reaches, or None for an unknown device.

    Args:
        images_per_second: training images a second over all devices.
        flops_per_image: forward FLOPs times the recipe's forward-equivalents.
        num_devices: devices that work on the run.
        device_name: as the driver gives it.
        precision: 'bf16' or 'fp16' (half rate), 'tf32' or 'fp32'.
    """
    rate = peak_rate(device_name)
    if rate is None or num_devices < 1:
        return None
    peak = {"bf16": rate.half, "fp16": rate.half, "tf32": rate.tf32}.get(precision, rate.fp32)
    return images_per_second * flops_per_image / (peak * num_devices)


def gpu_hours(seconds: float, num_devices: int) -> float:
    """Return device-hours of ``seconds`` of wall time on ``num_devices`` devices."""
    return seconds * num_devices / 3600


def seconds_left(*, step: float, total_steps: float, seconds_per_step: float) -> float | None:
    """Return the seconds until ``total_steps``, or None where the rate is not known."""
    if not (math.isfinite(seconds_per_step) and seconds_per_step > 0 and total_steps > 0):
        return None
    return max(0.0, total_steps - step) * seconds_per_step


def format_seconds(seconds: float | None) -> str:
    """Return a duration for people: ``48 s``, ``12 m 05 s``, ``3 h 20 m``, ``2 d 4 h``; ``–`` where unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} m"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def recipe_forward_flops(recipe: Mapping[str, Any]) -> int | None:
    """Return the FLOPs of one image's forward pass through a recipe's network, or None where it cannot be built.

    The network is built without storage, on the ``meta`` device.
    """
    try:
        import torch

        from distributed_at.config import ModelConfig
        from distributed_at.models import build_model

        data = recipe["data"]
        found = recorded_dataset(data)
        num_classes = int(data.get("num_classes") or getattr(found, "classes", None) or 0)
        model_config = ModelConfig.model_validate_json(json.dumps(recipe["model"]))
        with torch.device("meta"):
            model = build_model(model_config, num_classes=num_classes, image_size=int(data["image_size"]))
        return forward_flops(model, image_size=int(data["image_size"]))
    except Exception:  # an old recipe or an incomplete one: its cost is then not shown
        return None
