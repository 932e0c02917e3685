"""What one attack does, counted operator by operator: no timing, so a regression shows on any machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distributed_at.attacks import PGD, Threat
from distributed_at.attacks.balls import Bounds
from distributed_at.attacks.losses import Goal
from distributed_at.config import ModelConfig
from distributed_at.engine.twin.twin import Twin
from distributed_at.models import build_model

CLASSES = 5
HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")
VIEWS = ("view", "t", "expand", "detach", "slice", "select", "unsqueeze", "squeeze", "alias", "as_strided", "permute")
# ResNet-18, operators with work in one iteration, views left out: 20 convolutions, 17 ReLU, 8 additions, pooling,
# linear and loss, each forward and backward, and step and projection. Lower them when the attack does less.
BUDGET = {"fp32": 115, "bf16": 119, "fp16": 119}


class OperatorCount(TorchDispatchMode):
    """Counts operators and keeps what an attack must not do.

    Args:
        weights: tensors that must be neither cast nor differentiated inside the loop.
    """

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self._weights = {w.untyped_storage().data_ptr() for w in weights}
        self.operators: Counter[str] = Counter()
        self.weight_gradients: Counter[str] = Counter()
        self.weight_casts = 0
        self.host_reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.operators[name] += 1
        if name in HOST_READS:
            self.host_reads[name] += 1
        if name in ("convolution_backward", "native_batch_norm_backward", "native_group_norm_backward"):
            mask = args[-1]
            if any(mask[1:]):
                self.weight_gradients[name] += 1
        if name == "group_norm_relu_backward" and args[-1]:
            self.weight_gradients[name] += 1
        if name in ("_to_copy", "copy_", "clone") and self._is_weight(args[1] if name == "copy_" else args[0]):
            self.weight_casts += 1
        return func(*args, **(kwargs or {}))

    def _is_weight(self, x: object) -> bool:
        return isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in self._weights

    @property
    def work(self) -> int:
        return sum(count for name, count in self.operators.items() if name not in VIEWS)


@dataclass
class Setting:
    model: nn.Module
    twin: Twin
    attack: PGD
    x: torch.Tensor
    y: torch.Tensor

    def count(self, num_steps: int, iteration=None) -> OperatorCount:
        weights = [*self.model.parameters(), *self.twin.module.parameters()]
        with OperatorCount([w.detach() for w in weights]) as counted:
            replace(self.attack, num_steps=num_steps).perturb(self.twin, self.x, self.y, iteration=iteration)
        return counted


def setting(
    *, dtype: str = "fp32", bn_mode: str = "eval", norm: str = "linf", loss: str = "ce", **model: object
) -> Setting:
    fields = {"arch": "resnet18", "stem": "cifar", "base_width": 8, "groups": 4, **model}
    network = build_model(ModelConfig.model_validate(fields), num_classes=CLASSES)
    threat = Threat(norm, 8 / 255 if norm == "linf" else 0.5)
    attack = PGD(threat=threat, num_steps=2, step_size=2 / 255, loss=loss, check_input=False)
    x = torch.rand(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    return Setting(network, Twin(network, bn_mode=bn_mode, dtype=dtype), attack, x, torch.arange(4) % CLASSES)


CASES = [
    {"dtype": dtype, "norm": norm, "bn_mode": mode}
    for dtype in ("fp32", "bf16", "fp16")
    for norm in ("linf", "l2")
    for mode in ("eval", "batch")
]
CASES += [{"model_norm": norm, "arch": arch} for norm in ("mbn", "gn") for arch in ("resnet18", "preact_resnet18")]
CASES += [{"loss": loss} for loss in ("kl", "margin", "dlr")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_attack_computes_no_weight_gradient_casts_no_weight_and_reads_nothing_on_the_host(case: dict) -> None:
    case = dict(case)
    if "model_norm" in case:
        fields = {"arch": case["arch"]}
        found = _with_model_norm(case["model_norm"], fields)
    else:
        found = setting(**case)
    counted = found.count(3)
    assert not counted.weight_gradients
    assert counted.weight_casts == 0
    assert not counted.host_reads
    assert counted.operators["convolution_backward"] == 3 * sum(
        isinstance(layer, nn.Conv2d) for layer in found.twin.module.modules()
    ), "one input gradient a convolution and iteration"


def _with_model_norm(norm: str, fields: dict) -> Setting:
    network = build_model(
        ModelConfig.model_validate({"stem": "cifar", "base_width": 8, "groups": 4, "norm": norm, **fields}),
        num_classes=CLASSES,
    )
    base = setting()
    return replace(base, model=network, twin=Twin(network, bn_mode="eval"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_one_iteration_keeps_to_its_budget_of_operators(dtype: str) -> None:
    found = setting(dtype=dtype)
    iteration = found.count(5).operators - found.count(4).operators
    work = sum(count for name, count in iteration.items() if name not in VIEWS)
    assert iteration["convolution"] == iteration["convolution_backward"] == 20
    assert not any("batch_norm" in name for name in iteration), "frozen batch norm is inside the convolutions"
    assert work <= BUDGET[dtype], dict(iteration)


def test_sixteen_bits_cast_the_image_and_its_gradient_alone() -> None:
    found = setting(dtype="bf16")
    iteration = found.count(5).operators - found.count(4).operators
    plain = setting()
    without = plain.count(5).operators - plain.count(4).operators
    # image to 16 bits and its gradient back, logits to float32 and their gradient back
    assert iteration["_to_copy"] - without["_to_copy"] == 4


def test_backward_in_the_loop_is_caught() -> None:
    """The mutation: the same attack written with ``.backward()`` on the live network computes every weight gradient."""
    found = setting()
    found.model.eval()

    def backward_iteration(adv, step_size, bounds: Bounds, goal: Goal):
        with torch.enable_grad():
            image = adv.detach().requires_grad_()
            logits = found.model(image)
            nn.functional.cross_entropy(logits, goal.labels, reduction="sum").backward()
        return found.attack.threat.stepper()(adv, image.grad, step_size, bounds), logits.detach()

    counted = found.count(2, iteration=backward_iteration)
    assert counted.weight_gradients["convolution_backward"] == 2 * 20
    assert counted.weight_gradients["native_batch_norm_backward"] == 2 * 20


def test_autocast_in_the_loop_is_caught() -> None:
    """The mutation: autocast over frozen weights casts each of them again in every iteration."""
    found = setting()
    frozen = Twin(found.model, bn_mode="eval", fold=False, channels_last=False)

    def autocast_model(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return frozen(x)

    counted = found.count(2, iteration=found.attack.iteration(autocast_model))
    assert counted.weight_casts >= 2 * 21


@pytest.mark.parametrize("read", [lambda loss: loss.item(), lambda loss: bool(loss > 0)])
def test_host_read_in_the_loop_is_caught(read) -> None:
    found = setting()
    plain = found.attack.iteration(found.twin)

    def reading(adv, step_size, bounds, goal):
        following, logits = plain(adv, step_size, bounds, goal)
        read(logits.sum())
        return following, logits

    assert found.count(2, iteration=reading).host_reads["_local_scalar_dense"] == 2
