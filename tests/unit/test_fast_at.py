"""FastAT in pixels is FastAT in normalised pixels, where its code computes: one step, both clamps, two updates of BN."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from distributed_at import rng
from distributed_at.attacks import PGD, Threat
from distributed_at.recipes import load_recipe
from distributed_at.rng import Purpose

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]))
EPS, STEP = 8 / 255, 10 / 255


def network() -> nn.Module:
    generator = torch.random.fork_rng()
    with generator:
        torch.manual_seed(0)
        layers = (
            nn.Conv2d(3, 6, 3),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(24, 5),
        )
        return nn.Sequential(*layers).double().train()


def clamp(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.max(torch.min(x, high), low)


def in_normalised_space(net: nn.Module, x: torch.Tensor, y: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The step of Wong et al.'s train_fgsm, with eps / std for each channel; returns the images that are trained on."""
    mean, std = MEAN.double(), STD.double()
    lower, upper = (0 - mean) / std, (1 - mean) / std
    eps, alpha, x = EPS / std, STEP / std, (x - mean) / std
    delta = clamp(noise * eps, lower - x, upper - x).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(x + delta), y), delta)
    delta = clamp(delta.detach() + alpha * gradient.sign(), -eps, eps)
    return x + clamp(delta, lower - x, upper - x)


def test_pixels_and_normalised_pixels_give_the_same_images_and_statistics() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(16, 3, 8, 8, generator=generator, dtype=torch.float64).round(decimals=1)  # many at the box
    y, ids = torch.randint(0, 5, (16,), generator=generator), torch.arange(100, 116)
    ours, theirs = network(), network()
    attack = load_recipe("cifar/bag_of_tricks/table10.yaml#fast-wd5e-4-train").config.attack
    assert (attack.eps, attack.step_size, attack.num_steps, attack.bn_mode) == (8, 10, 1, "train")
    pgd = PGD(threat=Threat("linf", EPS), num_steps=1, step_size=STEP, start=attack.start, clip_start=attack.clip_start)
    adv = pgd.perturb(lambda v: ours((v - MEAN) / STD), x, y, sample_ids=ids, epoch=2, seed=5)
    unit = rng.uniform(5, Purpose.START, 2, ids, 3 * 8 * 8).double().view_as(x)
    published = in_normalised_space(theirs, x, y, 2 * unit - 1)
    assert (adv - (published * STD + MEAN)).abs().max() < 1e-7  # the radius is rounded to what the images can hold
    assert ((adv - x).abs() > 0.99 * EPS).double().mean() > 0.1
    assert ((adv == 0) | (adv == 1)).any()
    ours((adv - MEAN) / STD)
    theirs(published)
    assert ours[1].num_batches_tracked == theirs[1].num_batches_tracked == 2
    assert torch.allclose(ours[1].running_var, theirs[1].running_var, rtol=1e-6)
    untouched = copy.deepcopy(network())
    assert not torch.allclose(untouched[1].running_var, ours[1].running_var)
