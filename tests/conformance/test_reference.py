"""Our PGD against a plain one written from the papers alone, bitwise from the same start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distributed_at.attacks import PGD, Threat
from tests.conformance.networks import CLASSES, ids, images, labels, network

# radii that are exact in float32, so that the plain x - eps and ours are the same number
EPS, STEP = 2.0**-5, 2.0**-7


def plain_linf_pgd(model, x, y, start, *, steps: int, target=None, loss: str = "ce", eps: float = EPS):
    """Madry et al. 2018, section 2: x <- clip(x + step * sign(grad)), one image batch, nothing clever."""
    adv = start.clone()
    clean = F.softmax(model(x).detach(), dim=1)
    for _ in range(steps):
        adv = adv.detach().requires_grad_(True)
        logits = model(adv)
        if loss == "kl":
            value = F.kl_div(F.log_softmax(logits, dim=1), clean, reduction="sum")
        elif loss == "margin":
            true = logits.gather(1, y[:, None])[:, 0]
            value = (logits.scatter(1, y[:, None], -torch.inf).max(dim=1).values - true).sum()
        elif target is not None:
            value = -F.cross_entropy(logits, target, reduction="sum")
        else:
            value = F.cross_entropy(logits, y, reduction="sum")
        grad = torch.autograd.grad(value, adv)[0]
        adv = adv.detach() + STEP * torch.sign(grad)
        adv = torch.min(torch.max(adv, x - eps), x + eps)
        adv = torch.clamp(adv, 0.0, 1.0)
    return adv.detach()


def grid_images(n: int = 12) -> torch.Tensor:
    """Images on a grid of 2^-10, on which x - eps and x + eps do not round."""
    return (images(n) * 1024).round() / 1024


def start_of(attack: PGD, x: torch.Tensor) -> torch.Tensor:
    return attack.threat.random_start(
        x, seed=3, epoch=2, sample_ids=ids(len(x)), kind=attack.start, std=attack.start_std, clip=attack.clip_start
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"start": "zero"},
        {"clip_start": False},
        {"loss": "margin"},
        {"target": "random_other"},
        {"target": "most_confusing"},
        {"loss": "kl", "start": "gaussian", "clip_start": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_linf_pgd_equals_the_plain_one_bitwise(options: dict, layout: torch.memory_format) -> None:
    x, y, model = grid_images().contiguous(memory_format=layout), labels(), network()
    attack = PGD(threat=Threat("linf", EPS), num_steps=7, step_size=STEP, num_classes=CLASSES, **options)
    result = attack.perturb_with_info(model, x, y, sample_ids=ids(), seed=3, epoch=2)
    expected = plain_linf_pgd(
        model, x, y, start_of(attack, x), steps=7, target=result.targets, loss=options.get("loss", "ce")
    )
    differing = int((result.adv != expected).sum())
    # the KL is written differently, so a gradient of rounding size may change its sign
    assert differing <= (0.01 * x.numel() if options.get("loss") == "kl" else 0)


def test_xie_start_is_outside_the_box_before_the_first_gradient_alone() -> None:
    """Facts 2.1: noise unclipped, every later iterate clipped."""
    x, y, seen = torch.zeros(12, 3, 6, 6), labels(), []

    def spying(z):
        seen.append(z.detach().min().item())
        return network()(z)

    PGD(threat=Threat("linf", EPS), num_steps=3, step_size=STEP, clip_start=False).perturb(spying, x, y)
    assert seen[0] < -0.9 * EPS
    assert min(seen[1:]) >= 0


def test_l2_pgd_follows_the_plain_one() -> None:
    """Pang et al.'s code: g / ||g||, renorm to the ball, clip; equal to rounding in float64."""
    x, y, model = images(dtype=torch.float64), labels(), network(dtype=torch.float64)
    attack = PGD(threat=Threat("l2", 0.5), num_steps=8, step_size=0.1)
    adv = start = start_of(attack, x)
    for _ in range(8):
        adv = adv.detach().requires_grad_(True)
        grad = torch.autograd.grad(F.cross_entropy(model(adv), y, reduction="sum"), adv)[0]
        adv = adv.detach() + 0.1 * grad / grad.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        delta = (adv - x).flatten(1).renorm(p=2, dim=0, maxnorm=0.5).reshape(x.shape)
        adv = (x + delta).clamp(0, 1)
    ours = attack.perturb(model, x, y, sample_ids=ids(), seed=3, epoch=2)
    assert torch.allclose(ours, adv, atol=1e-9)
    assert not torch.allclose(ours, start, atol=1e-3)


def test_functional_iteration_equals_the_eager_one() -> None:
    """The form that is compiled makes the same steps."""
    x, y, model = images(), labels(), network()
    for norm, eps in (("linf", 8 / 255), ("l2", 0.5)):
        attack = PGD(threat=Threat(norm, eps), num_steps=4, step_size=eps / 3)
        pure = attack.iteration(model, functional=True)
        assert torch.equal(attack.perturb(model, x, y), attack.perturb(model, x, y, iteration=pure))


@pytest.mark.slow
def test_compiled_iteration_is_one_graph_and_agrees() -> None:
    """One graph, no break; sums may be taken in another order, so a few signs near zero may differ."""
    x, y, model = images(), labels(), network()
    attack = PGD(threat=Threat("linf", 8 / 255), num_steps=4, step_size=2 / 255)
    compiled = torch.compile(attack.iteration(model, functional=True), fullgraph=True, dynamic=False)
    adv, expected = attack.perturb(model, x, y, iteration=compiled), attack.perturb(model, x, y)
    assert (adv != expected).double().mean() < 0.01
    assert (adv - x).abs().max() <= 8 / 255
