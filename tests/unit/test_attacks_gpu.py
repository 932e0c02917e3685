"""The attacks on a CUDA device: no waiting for it, the same counters as on the CPU."""

from __future__ import annotations

import pytest
import torch

from distributed_at.attacks import PGD, Threat
from tests.conformance.networks import CLASSES, ids, images, labels, network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("target", ["none", "random_other", "most_confusing"])
def test_attack_never_waits_for_the_device(norm: str, target: str) -> None:
    model = network().cuda()
    x, y, keys = images().cuda(), labels().cuda(), ids().cuda()
    attack = PGD(
        threat=Threat(norm, 8 / 255), num_steps=3, step_size=2 / 255, restarts=2, target=target, num_classes=CLASSES,
        start_clean_probability=0.2, check_input=False,
    )  # fmt: skip
    call = {"sample_ids": keys, "epoch": 1, "seed": 2, "eps": torch.tensor(4 / 255, device="cuda")}
    attack.perturb(model, x, y, **call)  # library initialisation may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        attack.perturb_with_info(model, x, y, checkpoints=(1, 3), **call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_starts_and_targets_equal_those_of_the_cpu() -> None:
    x, y = images(low=0.3, high=0.7), labels()
    attack = PGD(threat=Threat("linf", 8 / 255), num_steps=0, step_size=0.1, target="random_other", num_classes=CLASSES)
    here = attack.perturb_with_info(network(), x, y, sample_ids=ids())
    there = attack.perturb_with_info(network().cuda(), x.cuda(), y.cuda(), sample_ids=ids().cuda())
    assert torch.equal(here.adv, there.adv.cpu())
    assert torch.equal(here.targets, there.targets.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ball_and_box_hold_exactly(dtype: torch.dtype) -> None:
    x, y = images(64, dtype=dtype).cuda(), labels(64).cuda()
    for norm, eps in (("linf", 0.03), ("linf", 8 / 255), ("l2", 0.5)):
        attack = PGD(threat=Threat(norm, eps), num_steps=10, step_size=eps / 3)
        adv = attack.perturb(network(dtype=dtype).cuda(), x, y)
        delta = (adv.double() - x.double()).flatten(1)
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert size.max().item() <= eps * (1 + (1e-7 if norm == "l2" else 1e-15))
        assert adv.min() >= 0
        assert adv.max() <= 1
