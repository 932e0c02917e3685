"""Checks of what an attack does between its start and its end: direction, step, projection, side effects.

Each check takes a Product and raises AssertionError where a promise is broken.
"""

from __future__ import annotations

import copy
import random

import numpy as np
import torch
import torch.nn.functional as F

from distributed_at.config import AttackConfig
from distributed_at.errors import UserError
from tests.conformance.networks import CLASSES, Spy, distance, ids, images, labels, network, regions, rising
from tests.conformance.product import Product

EPS = {"linf": 8 / 255, "l2": 0.5}


def ball_holds_exactly(product: Product) -> None:
    # 0.03 is no multiple of 1/255: x - 0.03 rounds to numbers outside the ball for half of all pixels
    for norm, eps in (*EPS.items(), ("linf", 0.03)):
        for dtype in (torch.float32, torch.float64):
            x, y = images(dtype=dtype), labels()
            adv = product.pgd(norm, eps, num_steps=12, step_size=eps / 2).perturb(network(dtype=dtype), x, y)
            worst = distance(adv, x, norm).max().item()
            slack = 0.0 if norm == "linf" and dtype == torch.float32 else 1e-15
            assert worst <= eps + slack, f"{norm} {dtype}: {worst} > {eps}"
            assert worst > 0.9 * eps, f"{norm}: the attack stays at {worst} of {eps}"


def box_holds_exactly(product: Product) -> None:
    edges = (images() > 0.5).float() * 0.99 + 0.005
    for norm, eps in EPS.items():
        for steps in (0, 1, 5):
            adv = product.pgd(norm, eps, num_steps=steps, clip_start=False).perturb(network(), edges, labels())
            low, high = adv.min().item(), adv.max().item()
            assert 0 <= low <= high <= 1, f"{norm}: [{low}, {high}] after {steps} steps"


def step_is_the_stated_length(product: Product) -> None:
    x, y = images(low=0.4, high=0.6, dtype=torch.float64), labels()
    x[0] *= 0.9  # images of different gradient scale: an L2 step belongs to one image
    for norm, size in (("linf", 2 / 255), ("l2", 0.1)):
        adv = product.pgd(norm, EPS[norm], num_steps=1, step_size=size, start="zero").perturb(
            network(dtype=torch.float64), x, y
        )
        moved = distance(adv, x, norm)
        assert torch.allclose(moved, torch.full_like(moved, size), rtol=1e-9), f"{norm}: {moved.tolist()} for {size}"
    delta = (adv - x).abs()
    assert (delta > 0).double().mean() > 0.99


def recipe_units_are_grey_levels(product: Product) -> None:
    config = AttackConfig(eps=8.0, num_steps=10, step_size=2.0, start="zero")
    attack = product.attacks.PGD.from_config(config, num_classes=2)
    x, y = images(low=0.4, high=0.6), torch.zeros(12, dtype=torch.int64)
    worst = distance(attack.perturb(rising, x, y), x, "linf").max().item()
    assert abs(worst - 8 / 255) < 1e-6, f"eps 8 grey levels moved {worst * 255:.3f} levels"
    try:
        product.attacks.Threat("linf", 8)
    except UserError:
        return
    raise AssertionError("Threat accepts eps = 8 in a box of [0, 1]")


def step_rule_reaches_the_ball(product: Product) -> None:
    config = AttackConfig(eps=16.0, num_steps=10, step_size=1.0, start="zero", step_rule="at_least_eps_over_steps")
    attack = product.attacks.PGD.from_config(config, num_classes=2)
    x, y = images(low=0.4, high=0.6), torch.zeros(12, dtype=torch.int64)
    worst = distance(attack.perturb(rising, x, y), x, "linf").max().item()
    assert abs(worst - 16 / 255) < 1e-5, f"10 steps of max(1, 16/10) reach {worst * 255:.3f} of 16"


def untargeted_attack_climbs(product: Product) -> None:
    x, y, model = images(), labels(), network()

    def wrong_minus_true(z: torch.Tensor) -> torch.Tensor:
        return z.scatter(1, y[:, None], float("-inf")).amax(1) - z.gather(1, y[:, None])[:, 0]

    def ratio(z: torch.Tensor) -> torch.Tensor:
        ranked = z.sort(dim=1).values
        return wrong_minus_true(z) / (ranked[:, -1] - ranked[:, -3])

    climbing = {"ce": lambda z: F.cross_entropy(z, y, reduction="none"), "margin": wrong_minus_true, "dlr": ratio}
    for loss, value in climbing.items():
        adv = product.pgd(loss=loss, num_steps=6, step_size=0.5 / 255, start="zero").perturb(model, x, y)
        fell = int((value(model(adv)) <= value(model(x))).sum())
        # dlr has kinks where logits change rank, so single images may fall
        assert fell <= (3 if loss == "dlr" else 0), f"{loss}: the loss fell for {fell} of {len(x)} images"


def targeted_attack_nears_its_target(product: Product) -> None:
    x, y = images(n=40), labels(40, classes=6)
    for loss in ("ce", "margin"):
        attack = product.pgd(target="random_other", num_classes=6, loss=loss, num_steps=6, start="zero")
        result = attack.perturb_with_info(regions, x, y)
        gain = regions(result.adv) - regions(x)
        gained = gain.gather(1, result.targets[:, None]).squeeze(1)
        assert (gained > 0).all(), f"{loss}: the target's logit fell"
        assert (regions(result.adv).softmax(1) - regions(x).softmax(1)).gather(1, result.targets[:, None]).min() > 0


def target_is_drawn_once_a_call(product: Product) -> None:
    x, y = images(n=40, low=0.4, high=0.6), labels(40, classes=6)
    attack = product.pgd(eps=16 / 255, target="random_other", num_classes=6, num_steps=8, start="zero")
    adv = attack.perturb(regions, x, y, sample_ids=ids(40))
    full = ((adv - x).mean(dim=(1, 3)) > 15.9 / 255).sum(dim=1)  # rows that rose in every step
    assert (full == 1).all(), "the target changed between iterations"


def first_step_leaves_from_the_start(product: Product) -> None:
    x, y = images(low=0.4, high=0.6), torch.zeros(12, dtype=torch.int64)
    start = product.pgd(num_steps=0).perturb(rising, x, y, sample_ids=ids())
    assert not torch.equal(start, x), "the start is the clean image"
    spy = Spy(rising)
    adv = product.pgd(num_steps=1).perturb(spy, x, y, sample_ids=ids())
    assert torch.equal(spy.seen[0], start), "the first gradient is not taken at the start"
    expected = torch.minimum(start + 2 / 255, x + 8 / 255)
    assert torch.allclose(adv, expected, atol=1e-7), "the first step does not leave from the start"


def last_iterate_is_returned(product: Product) -> None:
    x, y = images(low=0.4, high=0.6), torch.zeros(12, dtype=torch.int64)
    for steps in (1, 2, 3):
        adv = product.pgd(num_steps=steps, start="zero").perturb(rising, x, y)
        assert torch.allclose(adv - x, torch.full_like(x, steps * 2 / 255), atol=1e-6), f"{steps} steps"


def every_image_is_attacked_every_step(product: Product) -> None:
    x, y = images(n=70), labels(70)
    spy = Spy(network())
    adv = product.pgd(num_steps=4, start="zero").perturb(spy, x, y)
    assert len(spy.seen) == 4, f"{len(spy.seen)} forwards for 4 steps"
    assert all(len(seen) == 70 for seen in spy.seen), "part of the batch only"
    assert (distance(adv, x, "linf") > 0).all(), "some images are untouched"


def weights_gradients_are_untouched(product: Product) -> None:
    model = network()
    product.pgd().perturb(model, images(), labels())
    assert all(p.grad is None for p in model.parameters()), "the attack wrote .grad"
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    product.pgd().perturb(model, images(), labels())
    kept = all(p.grad is not None and bool((p.grad == 3.0).all()) for p in model.parameters())
    assert kept, "the attack changed .grad"
    assert all(p.requires_grad for p in model.parameters())


def training_state_is_untouched(product: Product) -> None:
    model = network(dropout=0.3).train()
    model[5].eval()  # a part that the user froze stays frozen, and only that part
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    product.pgd(restarts=2).perturb_with_info(model, images(), labels())
    assert flags == [m.training for m in model.modules()], "train/eval flags changed"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"


def global_generators_are_untouched(product: Product) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for start in ("uniform", "gaussian"):
        for norm in EPS:
            product.pgd(norm, EPS[norm], start=start, target="random_other", num_classes=CLASSES, restarts=2).perturb(
                network(), images(), labels()
            )
    assert torch.equal(before[0], torch.get_rng_state()), "torch's generator moved"
    assert (before[1] == np.random.get_state()[1]).all(), "numpy's generator moved"
    assert before[2] == random.getstate(), "python's generator moved"


def result_is_detached_and_input_kept(product: Product) -> None:
    x = images().requires_grad_()
    kept = x.detach().clone()
    for attack in (product.pgd(), product.pgd(restarts=2), product.pgd(num_steps=0)):
        adv = attack.perturb(network(), x, labels())
        assert not adv.requires_grad, "the result carries a graph"
        assert adv.data_ptr() != x.data_ptr(), "the result is the input"
        assert torch.equal(x, kept), "the input changed"
        assert x.grad is None, "the input was given a gradient"


def sum_and_mean_do_not_matter(product: Product) -> None:
    """A gradient near the smallest float32 survives a batch of 512: the loss is summed, not averaged."""

    def faint(x: torch.Tensor) -> torch.Tensor:
        total = x.flatten(1).sum(dim=1) * 1e-43
        return torch.stack([-total, total], dim=1)

    x, y = images(n=512, low=0.4, high=0.6), torch.zeros(512, dtype=torch.int64)
    adv = product.pgd(num_steps=1, start="zero").perturb(faint, x, y)
    assert (adv > x).all(), "the gradient underflowed"


def nan_gradient_moves_nothing(product: Product) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        return network()(x) * torch.where(torch.arange(len(x))[:, None] == 0, float("nan"), 1.0)

    for norm, eps in EPS.items():
        x, y = images(), labels()
        attack = product.pgd(norm, eps, start="zero")
        adv = attack.perturb(broken, x, y)
        assert torch.equal(adv[0], x[0]), f"{norm}: an image without a gradient moved"
        assert torch.isfinite(adv).all()
        assert torch.equal(adv[1:], attack.perturb(network(), x, y)[1:]), f"{norm}: NaN spread to other images"


def normalised_images_are_refused(product: Product) -> None:
    for bad in ((images() - 0.45) / 0.22, images() * 255, torch.full((12, 3, 6, 6), float("nan"))):
        try:
            product.pgd().perturb(network(), bad, labels())
        except UserError:
            continue
        raise AssertionError(f"images in [{bad.min():.2f}, {bad.max():.2f}] were attacked in a box of [0, 1]")


def radius_of_a_call_is_obeyed(product: Product) -> None:
    x, y = images(low=0.4, high=0.6), torch.zeros(12, dtype=torch.int64)
    attack = product.pgd(num_steps=20)
    for eps in (0.0, 4 / 255, torch.tensor(4 / 255), torch.tensor(0.0)):
        worst = distance(attack.perturb(rising, x, y, eps=eps), x, "linf").max().item()
        assert abs(worst - float(eps)) < 1e-6, f"eps {float(eps):.4f} of this call, reached {worst:.4f}"


def gradient_is_that_of_the_loss(product: Product) -> None:
    """The L2 direction of the first step is the finite-difference gradient, in float64."""
    x, y, model = images(n=4, low=0.3, high=0.7, dtype=torch.float64), labels(4), network(dtype=torch.float64)
    reference = {
        "ce": lambda z: F.cross_entropy(z, y, reduction="none"),
        "margin": lambda z: z.scatter(1, y[:, None], -1e9).amax(1) - z.gather(1, y[:, None])[:, 0],
    }
    for loss, value in reference.items():
        numeric = torch.zeros_like(x)
        with torch.no_grad():
            for index in range(x[0].numel()):
                shift = torch.zeros_like(x).flatten(1)
                shift[:, index] = 1e-6
                shift = shift.reshape(x.shape)
                slope = (value(model(x + shift)) - value(model(x - shift))) / 2e-6
                numeric.view(len(x), -1)[:, index] = slope
        adv = product.pgd("l2", 0.5, loss=loss, num_steps=1, start="zero").perturb(model, x, y)
        made = torch.nn.functional.normalize((adv - x).flatten(1), dim=1)
        expected = torch.nn.functional.normalize(numeric.flatten(1), dim=1)
        assert (made * expected).sum(1).min() > 1 - 1e-6, f"{loss}: direction is not the gradient"


def loop_waits_for_nothing(product: Product) -> None:
    """On the meta device a value read on the host raises: so does an attack that synchronises inside its loop."""
    x, y = torch.empty(4, 3, 6, 6, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    try:
        adv = product.pgd(restarts=2, target="most_confusing").perturb(copy.deepcopy(network()).to("meta"), x, y)
    except RuntimeError as error:
        raise AssertionError(f"the attack reads values on the host: {error}") from error
    assert adv.shape == x.shape


CHECKS = [
    ball_holds_exactly, box_holds_exactly, step_is_the_stated_length, recipe_units_are_grey_levels,
    step_rule_reaches_the_ball, untargeted_attack_climbs, targeted_attack_nears_its_target,
    target_is_drawn_once_a_call, first_step_leaves_from_the_start, last_iterate_is_returned,
    every_image_is_attacked_every_step, weights_gradients_are_untouched, training_state_is_untouched,
    global_generators_are_untouched, result_is_detached_and_input_kept, sum_and_mean_do_not_matter,
    nan_gradient_moves_nothing, normalised_images_are_refused, radius_of_a_call_is_obeyed,
    gradient_is_that_of_the_loss, loop_waits_for_nothing,
]  # fmt: skip
